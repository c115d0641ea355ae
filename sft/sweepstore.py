"""The storage of a sweep: an Optuna study, shared by drivers that may die at any moment.

Optuna keeps trials; what it does not keep is who runs which. Here every driver writes a heartbeat, every running trial
names its driver, and whatever must not happen twice (handing out a trial, taking one over, ending one) happens under
one guard (see sweepstorage). A driver is dead when its process is gone (same machine), or when its heartbeat has not
changed for `lease` seconds on the observer's own clock, so clocks need not agree.
"""

from __future__ import annotations

import hashlib
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import CategoricalChoiceType
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sft.errors import DeviceError, ResumeError, SftError
from sft.secrets import mask_secrets
from sft.sweepfile import LoadedSweep, Pruner
from sft.sweepidentity import fingerprint, is_alive, say_differences, this_process
from sft.sweepspace import Dimension, base_values, choice_name, walk
from sft.sweepstorage import Guard, is_storage_error, open_storage, without_password

_DRIVER = "driver:"
_FEWEST_FOR_IMPORTANCE = 8  # two trials in the best quarter


# Sampling -----------------------------------------------------------------------------------------------------------


def make_sampler(name: str, seed: int, number: int, total: int) -> optuna.samplers.BaseSampler:
    """A sampler whose draws for trial `number` depend on (seed, number, finished trials) and on nothing else.

    A sampler that lived on would draw its first points again after a restart.
    """
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
    if name == "random":
        return optuna.samplers.RandomSampler(seed=drawn)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=max(3, min(10, total // 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _Grid(seed=drawn)


class _Grid(optuna.samplers.BruteForceSampler):  # type: ignore[misc]
    """Optuna's exhaustive sampler; the driver counts the points itself, so nothing is stopped from in here."""

    def after_trial(self, *_: Any) -> None:
        return


def make_pruner(pruner: Pruner, evaluations: int | None) -> optuna.pruners.BasePruner:
    """`evaluations`: how many a whole run has after step 0, where that is known."""
    if pruner.type == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup, n_min_trials=1
        )
    if pruner.type == "hyperband":
        most: int | str = max(evaluations, pruner.min_evaluations) if evaluations else "auto"
        return optuna.pruners.HyperbandPruner(pruner.min_evaluations, most, pruner.reduction)
    if pruner.type == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(pruner.min_evaluations, pruner.reduction)
    return optuna.pruners.NopPruner()


def _suggest(trial: Trial, dimension: Dimension) -> Any:
    if dimension.kind == "int":
        step = 1 if dimension.step is None else int(dimension.step)
        return trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high), step=step, log=dimension.log)
    if dimension.kind == "float":
        return trial.suggest_float(dimension.key, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    names: Sequence[CategoricalChoiceType] = dimension.names
    name = trial.suggest_categorical(dimension.key, names)
    return next(
        choice
        for choice in dimension.choices
        if choice_name(choice) == name and type(choice_name(choice)) is type(name)
    )


# The study ----------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """A trial that this driver may run."""

    number: int
    trial: Trial
    values: dict[str, Any]
    adopted: bool

    def report(self, value: float, evaluation: int) -> bool:
        """Record an intermediate value, once. True when the pruner gives the trial up."""
        frozen = self.trial.study._storage.get_trial(self.trial._trial_id)
        if evaluation not in frozen.intermediate_values:
            self.trial.report(value, evaluation)
        return bool(self.trial.should_prune())


@dataclass
class _Seen:
    beat: Any
    at: float


@dataclass
class SweepStore:
    """One driver's view of the study. Every method may raise what the storage raises when it cannot be reached."""

    loaded: LoadedSweep
    storage: BaseStorage
    guard: Guard
    driver: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _beats: int = 0
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.loaded.spec
        every = self.loaded.base.config.eval.every
        self.evaluations = round(1 / every) if every != "auto" and 0 < every < 1 else None
        self.base = base_values(self.loaded.space, self.loaded.base.config)
        with self.guard():
            self.study = optuna.create_study(
                study_name=self._name(),
                storage=self.storage,
                direction=self.loaded.direction,
                load_if_exists=True,
                pruner=make_pruner(spec.pruner, self.evaluations),
            )
            self._begin()

    def _name(self) -> str:
        """A journal is its folder's own and goes where the folder is moved; a database knows a sweep by its `dir`."""
        kept = optuna.get_all_study_names(self.storage) if self.loaded.spec.storage is None else []
        return kept[0] if len(kept) == 1 else self.loaded.dir.as_posix()

    def _begin(self) -> None:
        """Write what the sweep is, or refuse to go on with another one; then queue the first points."""
        mine, written = fingerprint(self.loaded), self.study.user_attrs.get("sweep")
        if written is None:
            if self.study.get_trials(deepcopy=False):
                raise ResumeError(
                    f"storage: the study '{self.study.study_name}' was not made by sft sweep; choose another dir."
                )
            self.study.set_user_attr("id", uuid.uuid4().hex[:12])
            self.study.set_user_attr("sweep", mine)
        elif written != mine:
            raise ResumeError(say_differences(self.loaded, written, mine))
        if "ready" in self.study.user_attrs:
            return
        queued = {trial.user_attrs.get("first") for trial in self.study.get_trials(deepcopy=False)}
        for index, point in enumerate(self.loaded.first[: self.loaded.total]):
            if index not in queued:
                params = {key: choice_name(value) for key, value in point.values.items()}
                self.study.enqueue_trial(params, user_attrs={"first": index})
        self.study.set_user_attr("ready", True)

    @property
    def id(self) -> str:
        return str(self.study.user_attrs["id"])

    def mark(self, number: int) -> str:
        """What the processes of a trial carry in their environment."""
        return f"{self.id}/{number}"

    # Drivers

    def beat(self, *, leaving: bool = False) -> None:
        """Tell the other drivers that this one lives, or that it leaves."""
        self._beats += 1
        self.study.set_user_attr(
            _DRIVER + self.driver,
            {**this_process(), "beat": -1 if leaving else self._beats, "time": round(time.time())},
        )

    def is_dead(self, driver: str | None, attrs: Mapping[str, Any]) -> bool:
        """Whether a driver will never come back; one that cannot be judged is watched for the length of a lease."""
        record = attrs.get(_DRIVER + str(driver))
        if driver == self.driver:
            return False
        if record is None or record["beat"] == -1:
            return True
        if all(record[key] == value for key, value in this_process().items() if key in ("host", "boot", "namespace")):
            return not is_alive(record["pid"], record["start"])
        seen = self._seen.get(str(driver))
        if seen is None or seen.beat != record["beat"]:
            self._seen[str(driver)] = _Seen(record["beat"], time.monotonic())
            return False
        return time.monotonic() - seen.at > self.loaded.spec.lease

    # Trials

    def trials(self) -> list[FrozenTrial]:
        return list(self.study.get_trials(deepcopy=False))

    def claim(self, running: set[int]) -> Claim | None:
        """The next trial to run: one whose driver is dead, else a queued or a new one; None when there is none left.

        `running` are the numbers that this driver runs already.
        """
        with self.guard():
            trials = self.trials()
            attrs = self.study.user_attrs
            for trial in trials:
                if trial.state == TrialState.RUNNING and trial.number not in running:
                    owner = trial.user_attrs.get("owner")
                    if owner == self.driver or self.is_dead(owner, attrs):
                        return self._take(
                            Trial(self._study_for(trial.number), trial._trial_id), adopted=owner is not None
                        )
            begun = sum(trial.state != TrialState.WAITING for trial in trials)
            if begun >= self.loaded.total:
                return None
            waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
            return self._take(self._study_for(min(waiting, default=len(trials))).ask(), adopted=False)

    def _study_for(self, number: int) -> optuna.Study:
        spec = self.loaded.spec
        self.study.sampler = make_sampler(spec.sampler, spec.seed, number, self.loaded.total)
        return self.study

    def _take(self, trial: Trial, *, adopted: bool) -> Claim:
        """Choose what is not chosen yet, then sign. A driver that dies in here leaves a trial that names no owner."""
        first = trial.user_attrs.get("first")
        if first is not None and self.loaded.first[first].is_base:
            given = self.loaded.first[first].values
            values = walk([d for d in self.loaded.space if d.key in given], self.base, lambda d: _suggest(trial, d))
        else:
            values = walk(self.loaded.space, self.base, lambda d: _suggest(trial, d))
        trial.set_user_attr("values", values)
        trial.set_user_attr("owner", self.driver)
        return Claim(trial.number, trial, values, adopted)

    def owns(self, claim: Claim) -> bool:
        """Whether the trial still runs under this driver's name."""
        frozen = self.storage.get_trial(claim.trial._trial_id)
        return bool(frozen.state == TrialState.RUNNING and frozen.user_attrs.get("owner") == self.driver)

    def finish(self, claim: Claim, state: TrialState, value: float | None, notes: Mapping[str, Any]) -> bool:
        """Write the end of a trial, once. False when another driver has taken it over meanwhile."""
        with self.guard():
            frozen = self.storage.get_trial(claim.trial._trial_id)
            if frozen.user_attrs.get("owner") != self.driver:
                return False
            if frozen.state.is_finished():  # by us, just before the connection broke
                return True
            for key, note in notes.items():
                claim.trial.set_user_attr(key, note)
            self.study.tell(claim.number, value if state == TrialState.COMPLETE else None, state=state)
            return True

    def release(self, claim: Claim) -> None:
        """Give an interrupted trial back: whoever comes next goes on with it."""
        with self.guard():
            if self.owns(claim):
                claim.trial.set_user_attr("owner", "")

    def importances(self) -> dict[str, float]:
        """The share of each dimension in what made trials good (PED-ANOVA); empty where there are too few to say."""
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        names = sorted({name for trial in complete for name in trial.params})
        if len(complete) < _FEWEST_FOR_IMPORTANCE or len(names) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        with warnings.catch_warnings():  # it says that conditional dimensions with few trials are inexact; so do we
            warnings.simplefilter("ignore", UserWarning)
            found = optuna.importance.get_param_importances(self.study, evaluator=evaluator, params=names)
        return {name: float(share) for name, share in found.items()}


def open_store(loaded: LoadedSweep) -> SweepStore:
    """Open or create the study. Raises DeviceError where the storage fails, ResumeError where it is another sweep's."""
    storage, guard = open_storage(loaded.spec.storage, loaded.dir)
    try:
        return SweepStore(loaded, storage, guard)
    except SftError:
        raise
    except Exception as error:
        if is_storage_error(error):
            said = without_password(error, loaded.spec.storage)
            raise DeviceError(f"storage: {mask_secrets(str(loaded.spec.storage))}: {said}") from None
        raise
