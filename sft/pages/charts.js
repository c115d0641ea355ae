'use strict';
// Small SVG charts, enough for training curves. sft.data is the page's embedded data.
const sft = (() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const NS = 'http://www.w3.org/2000/svg';
  const svg = (name, attributes, parent) => {
    const element = document.createElementNS(NS, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(element);
    return element;
  };
  const html = (name, className, text, parent) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text != null) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  };
  const number = value => {
    if (value == null || !isFinite(value)) return '–';
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace('e+', 'e').replace(/\.?0+e/, 'e');
    if (size >= 1000) return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, '\u202f');
    return String(+value.toPrecision(4));
  };
  const percent = value => value == null ? '–' : (100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0) + '\u202f%';
  const short = value => {
    const size = Math.abs(value);
    if (size >= 1e9) return +(value / 1e9).toPrecision(3) + 'G';
    if (size >= 1e6) return +(value / 1e6).toPrecision(3) + 'M';
    if (size >= 1e4) return +(value / 1e3).toPrecision(3) + 'k';
    if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(/\.0e/, 'e');
    return String(+value.toPrecision(6));
  };
  const ticksBetween = (low, high, wanted, whole) => {
    const raw = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(raw));
    let step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= raw * 0.999);
    if (whole) step = Math.max(1, Math.round(step));
    const result = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) result.push(+(k * step).toPrecision(12));
    return result;
  };
  const logTicks = (low, high) => {
    const result = [], from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    for (let e = from; e <= to; e++) for (const f of to - from > 2 ? [1] : [1, 2, 5]) {
      const value = f * 10 ** e;
      if (value >= low * 0.999 && value <= high * 1.001) result.push(+value.toPrecision(6));
    }
    return result;
  };
  const range = (values, axis) => {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v != null && isFinite(v) && (!axis.log || v > 0)) { if (v < low) low = v; if (v > high) high = v; }
    if (low > high) return null;
    if (axis.min != null) low = Math.min(low, axis.min);
    if (axis.max != null) high = Math.max(high, axis.max);
    if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return axis.log ? [low / 2, high * 2] : [axis.min != null ? Math.min(axis.min, low) : low - pad, high + pad]; }
    if (axis.tight) return [low, high];
    if (axis.log) return [low / 1.15, high * 1.15];
    const pad = (high - low) * 0.05;
    return [axis.min != null && low >= axis.min ? Math.max(axis.min, low - pad) : low - pad, high + pad];
  };
  const scaler = (domain, out, log) => {
    const f = log ? Math.log : v => v, a = f(domain[0]), b = f(domain[1]);
    return v => out[0] + (f(v) - a) / (b - a) * (out[1] - out[0]);
  };
  const redraw = (box, draw) => {
    let width = box.clientWidth;
    if (width) draw(width);
    new ResizeObserver(() => {
      const now = box.clientWidth;
      if (now && now !== width) { width = now; requestAnimationFrame(() => draw(now)); }
    }).observe(box);
  };

  // figure(parent, title, legend?) -> the box a chart is drawn in
  const figure = (parent, title, series) => {
    const element = html('figure', '', null, parent), caption = html('figcaption', '', null, element);
    html('b', '', title, caption);
    for (const s of series || []) {
      const item = html('span', 'legend', null, caption), mark = html('i', s.style === 'points' ? 'dot' : s.style === 'faint' ? 'thin' : '', null, item);
      mark.style.color = mark.style.borderTopColor = s.color;
      item.append(s.name);
    }
    return html('div', 'chart', null, element);
  };

  // lines(parent, {title, series: [{name, points: [[x, y]...], color, style: line|faint|points|both, dash}], x, y: {log, min, max, format}, height})
  const lines = (parent, options) => {
    const {title, series, x = {}, y = {}, height = 210} = options;
    const shown = series.filter(s => s.points.some(p => p[1] != null));
    const box = figure(parent, title, options.legend === false || shown.length < 2 ? [] : shown);
    if (!shown.length) { html('div', 'empty', options.empty || 'Nothing recorded.', box); return box; }
    const domainX = range(shown.flatMap(s => s.points.map(p => p[0])), {tight: true, ...x});
    const domainY = range(shown.flatMap(s => s.points.map(p => p[1])), y);
    if (!domainY) { html('div', 'empty', 'No value can be drawn on a logarithmic axis.', box); return box; }
    const formatY = y.format || number, formatX = x.format || number;
    const tip = html('div', 'tip', null, box);
    let plot = null;
    redraw(box, width => {
      if (plot) plot.remove();
      const ticksY = y.log ? logTicks(...domainY) : ticksBetween(...domainY, height / 46);
      const labels = ticksY.map(v => (y.tick || (y.format ? y.format : short))(v));
      const left = 10 + 6.6 * Math.max(...labels.map(l => l.length)), right = 8, top = 8, bottom = 24 + (x.label ? 14 : 0);
      plot = svg('svg', {class: 'plot', viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': title});
      box.insertBefore(plot, tip);
      const sx = scaler(domainX, [left, width - right], x.log), sy = scaler(domainY, [height - bottom, top], y.log);
      ticksY.forEach((v, i) => {
        svg('line', {class: 'grid', x1: left, x2: width - right, y1: sy(v), y2: sy(v)}, plot);
        svg('text', {x: left - 7, y: sy(v) + 4, 'text-anchor': 'end'}, plot).textContent = labels[i];
      });
      for (const v of x.log ? logTicks(...domainX) : ticksBetween(...domainX, width / 90, x.whole))
        svg('text', {x: sx(v), y: height - bottom + 17, 'text-anchor': 'middle'}, plot).textContent = (x.tick || short)(v);
      svg('line', {class: 'axis', x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}, plot);
      if (x.label) svg('text', {x: (left + width - right) / 2, y: height - 3, 'text-anchor': 'middle'}, plot).textContent = x.label;
      for (const s of shown) {
        const style = s.style || 'line', ok = p => p[1] != null && isFinite(p[1]) && (!y.log || p[1] > 0);
        if (style !== 'points') {
          let d = '', pen = false;
          for (const p of s.points) { if (!ok(p)) { pen = false; continue; } d += (pen ? 'L' : 'M') + sx(p[0]).toFixed(1) + ' ' + sy(p[1]).toFixed(1); pen = true; }
          svg('path', {d, fill: 'none', style: `stroke:${s.color}`, 'stroke-width': style === 'faint' ? 1 : s.width || 2, 'stroke-opacity': style === 'faint' ? .32 : s.opacity || 1,
            'stroke-linejoin': 'round', 'stroke-linecap': 'round', 'stroke-dasharray': s.dash || 'none'}, plot);
        }
        const good = s.points.filter(ok), alone = s.points.filter((p, i, all) => ok(p) && !(i && ok(all[i - 1])) && !(i + 1 < all.length && ok(all[i + 1])));
        if (style === 'line' || style === 'faint')  // a value between two gaps has no line to be seen by
          for (const p of alone) svg('circle', {cx: sx(p[0]), cy: sy(p[1]), r: 2, style: `fill:${s.color}`, 'fill-opacity': style === 'faint' ? .5 : 1}, plot);
        if (style === 'points' || style === 'both' || good.length === 1)
          for (const p of good) svg('circle', {cx: sx(p[0]), cy: sy(p[1]), r: good.length > 60 ? 2.2 : 3.4, style: `fill:${s.color};stroke:var(--panel)`, 'stroke-width': 1.5}, plot);
      }
      const cursor = svg('line', {class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden'}, plot);
      plot.onpointerleave = () => { tip.style.display = 'none'; cursor.setAttribute('visibility', 'hidden'); };
      plot.onpointermove = event => {
        const px = event.clientX - plot.getBoundingClientRect().left;
        let at = null;
        const nearest = s => s.points.reduce((best, p) => p[1] != null && (best == null || Math.abs(sx(p[0]) - px) < Math.abs(sx(best[0]) - px)) ? p : best, null);
        const hits = shown.map(s => [s, nearest(s)]).filter(h => h[1]);
        for (const [, p] of hits) if (at == null || Math.abs(sx(p[0]) - px) < Math.abs(sx(at) - px)) at = p[0];
        if (at == null) return;
        tip.replaceChildren();
        html('b', '', (x.name || x.label || 'step') + ' ' + formatX(at), tip);
        for (const [s, p] of hits) {
          if (Math.abs(sx(p[0]) - sx(at)) > 6) continue;
          const row = html('div', '', null, tip);
          html('span', '', s.name, row).style.color = s.color;
          html('b', '', (p[2] != null ? p[2] + '  ' : '') + formatY(p[1]), row);
        }
        cursor.setAttribute('x1', sx(at)); cursor.setAttribute('x2', sx(at)); cursor.setAttribute('visibility', 'visible');
        tip.style.display = 'block'; tip.style.top = '10px';
        const space = sx(at) + 14 + tip.offsetWidth > width;
        tip.style.left = (space ? Math.max(0, sx(at) - 14 - tip.offsetWidth) : sx(at) + 14) + 'px';
      };
    });
    return box;
  };

  // bars(parent, {title, bars: [{label, value, title, color}], format, height, xLabel})
  const bars = (parent, options) => {
    const {title, height = 190, format = number} = options, items = options.bars;
    const box = figure(parent, title, options.legend || []);
    const high = Math.max(0, ...items.map(b => b.value));
    if (!items.length || high === 0) { html('div', 'empty', options.empty || 'Nothing recorded.', box); return box; }
    const tip = html('div', 'tip', null, box);
    let plot = null;
    redraw(box, width => {
      if (plot) plot.remove();
      const ticks = ticksBetween(0, high, height / 40, options.whole !== false), left = 10 + 6.6 * Math.max(...ticks.map(t => short(t).length));
      const bottom = 24 + (options.xLabel ? 15 : 0), top = 8, right = 8;
      plot = svg('svg', {class: 'plot', viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': title});
      box.insertBefore(plot, tip);
      const sy = scaler([0, high], [height - bottom, top]), slot = (width - left - right) / items.length;
      for (const v of ticks) {
        svg('line', {class: 'grid', x1: left, x2: width - right, y1: sy(v), y2: sy(v)}, plot);
        svg('text', {x: left - 7, y: sy(v) + 4, 'text-anchor': 'end'}, plot).textContent = short(v);
      }
      svg('line', {class: 'axis', x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}, plot);
      const widest = Math.max(...items.map(b => String(b.label).length)) * 6.6 + 10, every = Math.max(1, Math.ceil(widest / slot));
      items.forEach((bar, i) => {
        const bx = left + i * slot, gap = Math.min(3, slot * 0.15), h = height - bottom - sy(bar.value);
        svg('rect', {x: bx + gap / 2, y: sy(bar.value), width: Math.max(1, slot - gap), height: Math.max(bar.value ? 1 : 0, h), rx: Math.min(2, slot / 4), style: `fill:${bar.color || 'var(--c1)'}`, 'fill-opacity': .82}, plot);
        if (i % every === 0) svg('text', {x: bx + slot / 2, y: height - bottom + 17, 'text-anchor': 'middle'}, plot).textContent = bar.label;
        const hit = svg('rect', {x: bx, y: top, width: slot, height: height - bottom - top, fill: 'transparent'}, plot);
        hit.onpointerenter = () => {
          tip.replaceChildren(); html('b', '', bar.title || bar.label, tip);
          html('div', '', format(bar.value), tip);
          tip.style.display = 'block'; tip.style.top = '6px';
          tip.style.left = Math.min(Math.max(0, bx + slot + 6), Math.max(0, width - tip.offsetWidth - 4)) + 'px';
        };
        hit.onpointerleave = () => { tip.style.display = 'none'; };
      });
      if (options.xLabel) svg('text', {x: (left + width - right) / 2, y: height - 3, 'text-anchor': 'middle'}, plot).textContent = options.xLabel;
    });
    return box;
  };
  return {data, svg, html, figure, lines, bars, number, percent, short, ticksBetween, logTicks, scaler, range, redraw};
})();
