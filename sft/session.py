"""A run in progress: its job, its folder, what is cumulative; opening, evaluating, saving, finishing.

The loop itself is in `sft.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft import budget, compiling, liger, setup
from sft.accelerator import shard_in
from sft.batches import Join
from sft.budget import Evaluations, Work, decide, kept
from sft.checkpoint import CheckpointStore, read_tensors, write_tensors
from sft.choice import best_step, scores_of, stops_early
from sft.config import Config
from sft.data.collate import to_device
from sft.devices import add_to, described, zeros_64
from sft.distributed import from_first_rank, gather, sum_over_ranks
from sft.durable import as_readable_as, write_json, write_text
from sft.evaluate import EvalSums, eval_plan, metrics, score_hidden
from sft.generate import answer_samples
from sft.model import resolve_precision
from sft.opening import Opening, cut_metrics, on_first_rank, work_of_run
from sft.optim import load_state_by_name, state_by_name, whole
from sft.phases import describe
from sft.progress import Progress
from sft.resume import RunState
from sft.runfolder import MetricsLog, RunFolder
from sft.schedule import Plan, due_steps_left, peak_learning_rate
from sft.space import check_space
from sft.timeleft import seconds_left
from sft.trainee import loss_sum
from sft.versions import git_commit, versions
from sft.weightfiles import saved_dtype, write_dtype

if TYPE_CHECKING:
    from sft.configfile import LoadedConfig
    from sft.data.loader import Prepared
    from sft.setup import Job
    from sft.tokenizer import TokenizerBundle


@dataclass
class Session:
    config: Config
    folder: RunFolder
    job: Job
    bundle: TokenizerBundle
    data: Prepared
    state: RunState  # replaced after every step
    metrics: MetricsLog
    store: CheckpointStore
    progress: Progress
    evals: Evaluations
    work: Work
    began: RunState  # as this process found it

    def say(self, text: str) -> None:
        self.progress.console.say(text)

    # Time ----------------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float:
        """Evaluations, samples, saves and the serving check included."""
        step, total = self.state.step, self.job.plan.total_steps
        done = self.state.seconds - self.began.seconds, step - self.began.step
        return seconds_left(
            step,
            work=self.work,
            chosen=self.evals,
            saves_left=due_steps_left(step, self.config.save.every, total),
            step_seconds=done[0] / max(1, done[1]),
            last=self.progress.phases.last,
        )

    def record_time(self) -> None:
        """Where the time went, at the end or a stop of the run: into metrics.jsonl and on the console."""
        seconds = self.progress.phases.seconds()
        total = round(sum(seconds.values()), 3)
        self.metrics.append({"event": "time", "step": self.state.step, **seconds, "total": total})
        self.say(f"time: {describe(seconds)}")

    # Scores and samples ------------------------------------------------------------------------------------------

    def evaluate(
        self, step: int, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float | int | None] | None:
        """Scores the held-out split, answers its first prompts, and records both.

        None where any rank is asked to stop on the way: nothing is recorded, and the resumed run evaluates this step.
        """
        split = self.data.eval
        assert split is not None
        scores = self.score_held_out(asked_to_stop, f"step {step}: evaluating, in micro-batches")
        if scores is None:
            return None
        samples = self._samples(split.samples[: self.evals.samples])
        if self.job.is_first:
            self.metrics.append({"event": "eval", "step": step, **scores})
            if samples:
                self.metrics.append({"event": "samples", "step": step, "samples": samples})
            self.say(
                f"step {step}: held-out loss {_short(scores['loss'])}, token accuracy "
                f"{_short(scores['token_accuracy'])}, stop probability {_short(scores['stop_probability'])}"
            )
        return scores

    def score_held_out(
        self, asked_to_stop: Callable[[], bool] = lambda: False, what: str = "evaluating"
    ) -> dict[str, float | int | None] | None:
        """The weights as they are, on the held-out split, each row once across ranks. None where a rank is to stop."""
        job, split = self.job, self.data.eval
        assert split is not None
        total_6 = zeros_64(6, job.device)
        join = Join(job.flat_rows, job.pad_id)
        lengths = [int(n) for n in split.lengths_E]
        parts = list(eval_plan(lengths, rank=job.rank, ranks=job.world, micro_tokens=job.micro_tokens))
        with (
            self.progress.phase("evaluation", what, len(parts)) as tick,
            compiling.scoring(job.trainee, job.resolved[compiling.KEY]),
        ):
            for done, members in enumerate(parts, 1):
                batch = to_device(join([split.example(e) for e in members]), job.device)

                def score(features: torch.Tensor, head: Any, batch: Any = batch) -> torch.Tensor:
                    return score_hidden(features, head, batch.targets_M, batch.weights_M, self.bundle.stop_ids)

                add_to(total_6, loss_sum(job.trainee, job.trainee, batch, score))
                if any(sum_over_ranks([float(asked_to_stop())], job.device)):
                    return None
                tick(done)
        return metrics(EvalSums(*sum_over_ranks(total_6.tolist(), job.device)))

    def _samples(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Greedy answers; a sharded model needs all ranks for them, else rank 0 alone writes them."""
        job, most = self.job, self.config.eval.max_new_tokens
        if not samples or not (job.is_first or job.is_sharded):
            return []
        with (
            self.progress.phase("samples", f"answering {len(samples)} held-out prompts, in tokens", most) as tick,
            compiling.scoring(job.trainee, job.resolved[compiling.KEY]),
            torch.autocast(job.device.type, job.trainee.compute_dtype, enabled=job.trainee.autocast),
        ):
            return answer_samples(
                job.trainee.model,
                self.bundle.tokenizer,
                samples,
                stop_ids=self.bundle.stop_ids,
                max_new_tokens=most,
                tick=tick,
            )

    def scores(self, metric: str) -> dict[int, float]:
        """{step: value} of an evaluation metric so far, on every rank. Progress is read, never remembered."""
        found = scores_of(self.metrics.read(), metric) if self.job.is_first else {}
        return dict(from_first_rank(list(found.items())))

    def best_step(self) -> int | None:
        """The step with the best `save.best` of those whose weights are there: checkpoints, and the current step."""
        metric = self.config.save.best
        if metric is None:
            return None
        return best_step(self.scores(metric), metric, from_first_rank([*self.store.steps(), self.state.step]))

    def should_stop_early(self) -> bool:
        early = self.config.train.early_stopping
        return early is not None and stops_early(self.scores(early.metric), early)

    # Saving --------------------------------------------------------------------------------------------------------

    def save(self, *, best: int | None, is_last: bool = False) -> None:
        """Publishes a checkpoint of `state.step`. Ranks wait for the copy to the host, not for the disk.

        `best`: the step whose checkpoint stays from then on, whatever its age. After the last step nothing moves a
        weight, so they are written from where they are, without a copy.
        """
        with self.progress.phase("saving", f"step {self.state.step}: saving a checkpoint"):
            self._save(best, is_last=is_last)

    def _save(self, best: int | None, *, is_last: bool) -> None:
        job = self.job
        weights = self.trained_weights(copy=not is_last)
        if not (job.is_first or job.is_sharded):
            return
        optimizer = state_by_name(job.optimizer, job.names, copy=not is_last, keep=job.is_first)
        if not job.is_first:
            return
        state = replace(self.state, resolved=job.resolved, phases=self.progress.phases.seconds())
        self.metrics.flush_to_disk()

        def write(folder: Path) -> None:
            self.write_model(folder / "model", weights)
            write_tensors(folder / "optimizer.safetensors", optimizer)
            write_json(folder / "state.json", state.as_dict())

        self.store.save(state.step, write, protect=best)

    def trained_weights(self, *, copy: bool = True) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, whole, on the host: all weights, or the adapter's. A collective if sharded.

        Only rank 0, which writes them, is given them.
        """
        job, trainee = self.job, self.job.trainee
        if not (job.is_first or job.is_sharded):
            return {}

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            return whole(tensor, copy=copy, keep=job.is_first)

        if self.config.model.tuning == "full":
            return _each_once(trainee.causal.state_dict(keep_vars=True), taken)
        # by what the state holds: after an evaluation, parameters of FSDP are not the tensors of its state
        state = trainee.model.state_dict(keep_vars=True)
        return {name: taken(tensor) for name, tensor in state.items() if tensor.requires_grad}

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        """A folder that `from_pretrained` or PEFT loads: weights, tokenizer with its template, generation settings."""
        trainee, bundle = self.job.trainee, self.bundle
        folder.mkdir(parents=True, exist_ok=True)
        if dtype is not None:
            weights = _each_once(weights, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if self.config.model.tuning == "full":
            trainee.causal.save_pretrained(folder, state_dict=weights)
            write_dtype(folder / "config.json", next(t.dtype for t in weights.values() if t.is_floating_point()))
        else:
            trainee.model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        bundle.tokenizer.save_pretrained(folder)
        self.generation_config().save_pretrained(folder)
        as_readable_as(folder / "generation_config.json", folder.glob("*.safetensors"))

    def generation_config(self) -> Any:
        """The base model's, stopping where the template's turns end."""
        from copy import deepcopy

        from transformers import GenerationConfig

        settings = deepcopy(self.job.trainee.causal.generation_config) or GenerationConfig()  # type: ignore[no-untyped-call]
        settings.eos_token_id = list(self.bundle.stop_ids)
        if settings.pad_token_id is None:
            settings.pad_token_id = self.job.pad_id
        if settings.temperature is not None or settings.top_p is not None:
            settings.do_sample = settings.do_sample or None
        return settings


def open_session(
    loaded: LoadedConfig,
    folder: RunFolder,
    bundle: TokenizerBundle,
    data: Prepared,
    opening: Opening,
    accelerator: Any,
    the_plan: Plan,
    progress: Progress,
    *,
    date_pinned: str,
) -> Session:
    """Loads the model, proves it, prepares it for its processes, restores the optimizer, records what was decided."""
    config, state, say = loaded.config, opening.state, progress.console.say
    device = accelerator.device
    recorded = state.resolved
    _set_threads(config, recorded, accelerator.num_processes)
    precision = resolve_precision(config.model.precision, device)
    if config.model.precision == "auto" and recorded.get("precision", precision) != precision:
        say(f"note: precision stays {recorded['precision']}, as this run began; auto would choose {precision} here")
        precision = recorded["precision"]
    trainee, facts = setup.build_trainee(
        config, bundle, precision=precision, device=device, checkpoint=opening.checkpoint, say=say
    )
    trainee.train()  # before any forward pass: in evaluation mode, 4-bit layers repack their weights on some CPUs
    proof: dict[str, Any] = {key: recorded[key] for key in ("flat_rows", "head_path") if key in recorded}
    if not proof or config.model.attention not in ("auto", "flat"):
        proof = setup.prove(trainee, config, say)
    elif not proof["flat_rows"]:
        trainee.causal.set_attn_implementation("sdpa")
    trainee.head_path = proof["head_path"]
    if opening.checkpoint is None:
        chosen = gather(setup.choose_loss_kernel(trainee, say))
        if len(set(chosen)) > 1:
            say("note: the loss is computed without Liger's kernel: not every rank can use it")
        trainee.loss_kernel = chosen[0] if len(set(chosen)) == 1 else "plain"
    else:  # runs of before Liger was used have no record of it
        trainee.loss_kernel = recorded.get(liger.KEY, "plain")
    proof[liger.KEY] = trainee.loss_kernel
    lengths = data.train.lengths_E
    tokens_per_step = int(lengths.mean() * config.batch.examples / accelerator.num_processes) + 1
    checkpointing = recorded.get("gradient_checkpointing")
    if checkpointing is None or config.model.gradient_checkpointing != "auto":
        checkpointing = setup.wants_checkpointing(
            config, facts["parameters"], min(tokens_per_step, max(2048, int(lengths.max()))), device
        )
    if checkpointing:
        setup.enable_checkpointing(trainee)
    proof[compiling.KEY] = compiling.choose(
        trainee, config.model.compile, recorded if opening.checkpoint else None, flat_rows=proof["flat_rows"],
        tokens=the_plan.total_steps * tokens_per_step, pad_id=bundle.tokenizer.pad_token_id or 0,
        checkpointing=checkpointing, say=say,
    )  # fmt: skip
    work = work_of_run(config, the_plan, data)
    evals = decide(config, work) if opening.checkpoint is None else kept(config, recorded, work)
    peak = peak_learning_rate(config)
    optimizer = setup.build_optimizer(config, trainee, peak)
    shard_in(accelerator, precision)
    module, optimizer = accelerator.prepare(trainee, optimizer)
    job = setup.Job(
        accelerator=accelerator,
        trainee=trainee,
        module=module,
        optimizer=optimizer.optimizer,
        names={parameter: name for name, parameter in trainee.named_parameters() if parameter.requires_grad},
        plan=the_plan,
        peak_lr=peak,
        flat_rows=proof["flat_rows"],
        micro_tokens=0,
        pad_id=bundle.tokenizer.pad_token_id or 0,
    )
    setup.warm_up(job)
    micro = recorded.get("micro_tokens") if config.batch.micro_tokens == "auto" else None
    job.micro_tokens = micro or setup.choose_micro_tokens(job, config, int(lengths.max()), tokens_per_step)
    job.micro_tokens = min(gather(job.micro_tokens))
    job.resolved = {
        **{key: recorded.get(key, value) if opening.checkpoint else value for key, value in facts.items()},
        **proof,
        "precision": precision,
        "gradient_checkpointing": checkpointing,
        "micro_tokens": job.micro_tokens,
        "lr": peak,
        "stop_ids": list(bundle.stop_ids),
        "processes": job.world,
        "threads": torch.get_num_threads(),
        budget.KEY: evals.as_dict(),
    }
    if opening.checkpoint is not None:
        load_state_by_name(job.optimizer, job.names, read_tensors(opening.checkpoint / "optimizer.safetensors"))
    if config.model.tuning == "full":
        job.resolved["saved_dtype"] = recorded.get("saved_dtype") or saved_dtype(config.model, trainee)
    state = replace(state, total_steps=the_plan.total_steps)
    session = Session(
        config, folder, job, bundle, data, state, MetricsLog(folder.metrics),
        CheckpointStore(folder.checkpoints, config.save.keep), progress, evals, work, state,
    )  # fmt: skip
    _check_disk(session)
    on_first_rank(job.is_first, lambda: cut_metrics(session.metrics, config, opening, say))
    if job.is_first:
        _record(loaded, session, date_pinned)
    return session


def _set_threads(config: Config, recorded: Mapping[str, Any], processes: int) -> None:
    """Sums over another number of threads end in other bits, so what `auto` became is kept while the ranks are."""
    if config.run.threads != "auto":
        torch.set_num_threads(config.run.threads)
    elif recorded.get("processes") == processes:
        torch.set_num_threads(recorded["threads"])


def _check_disk(session: Session) -> None:
    """keep + 1 checkpoints and final/ must fit, before the first step rather than at the first save."""
    trainee, tuning = session.job.trainee, session.config.model.tuning
    kept = [p for p in trainee.parameters() if p.requires_grad or tuning == "full"]
    weights = sum(p.numel() * p.element_size() for p in kept)
    session.store.expected_bytes = 3 * weights
    on_first_rank(
        session.job.is_first,
        lambda: check_space(session.folder.path, 3 * weights, session.config.save.keep, final_bytes=weights),
    )


def _record(loaded: LoadedConfig, session: Session, date_pinned: str) -> None:
    from sft.configfile import dump_config

    folder, job = session.folder, session.job
    resolved = {
        "optim.lr": job.peak_lr,
        "batch.micro_tokens": job.micro_tokens,
        "model.precision": job.resolved["precision"],
        "model.gradient_checkpointing": job.resolved["gradient_checkpointing"],
        "model.compile": job.resolved[compiling.KEY],
        "model.attention": "flat" if job.flat_rows else "padded",
        **(
            {"eval.every": session.evals.every_steps, "eval.samples": session.evals.samples}
            if session.data.eval
            else {}
        ),
        **({"run.threads": job.resolved["threads"]} if job.device.type == "cpu" else {}),
    }
    write_text(folder.config, dump_config(loaded, resolved))
    environment = {
        "date": date_pinned,
        "total_steps": job.plan.total_steps,
        "versions": versions(),
        "device": described(job.device),
        "processes": job.world,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "resolved": job.resolved,
    }
    write_json(folder.environment, environment)
    write_json(folder.data, session.data.report)
    ledger = session.data.path / "data_report.jsonl"
    write_text(folder.data_report, ledger.read_text(encoding="utf-8") if ledger.exists() else "")
    if session.state.step > 0:
        now = {"step": session.state.step, "seconds": session.state.seconds, "processes": job.world}
        changes = {"changes": session.state.consents} if session.state.consents else {}
        session.metrics.append({"event": "resume", **now, **changes})


def _each_once(
    tensors: Mapping[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`change` applied to every tensor; weights that are tied, one tensor under two names, stay tied."""
    changed: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in changed:
            changed[id(tensor)] = change(tensor)
    return {name: changed[id(tensor)] for name, tensor in tensors.items()}


def _short(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}"
