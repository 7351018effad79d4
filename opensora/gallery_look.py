"""How the gallery looks and what its controls do: CSS, and a script that sorts, filters and plays what is in sight."""

STYLE = """
:root { --good: #17803f; --soft: #8881; --line-0: #3b82f6; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc27b; --bad: #ff7b6b; } }
body { max-width: 1500px; } h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { margin: .3rem 0; max-width: 80ch; } .said { border-left: 3px solid var(--bad); padding-left: .7rem; }
td, th { padding: .3rem .8rem; vertical-align: top; } th { font-weight: 600; } th.n { text-align: right; }
.wide { overflow-x: auto; } .good { color: var(--good); } .bad { color: var(--bad); } small { opacity: .75; }
s.bad { text-decoration-thickness: 1px; } code { font-size: .85em; }
.curves { display: flex; flex-wrap: wrap; gap: 2rem; } .curves figure { margin: 0; } .curves svg { display: block; }
polyline { fill: none; stroke: var(--line-0); stroke-width: 1.5; } .curves path { stroke: var(--line); fill: none; }
svg text { font-size: 11px; fill: currentColor; opacity: .7; } figcaption { font-size: .85rem; }
form { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; z-index: 1;
  padding: .6rem 0; background: Canvas; border-bottom: 1px solid var(--line); } form[hidden] { display: none; }
input, select { font: inherit; padding: .15rem .4rem; margin-left: .4rem; max-width: 17rem; }
article { display: grid; grid-template-columns: 25rem 1fr; gap: .5rem 1.5rem; padding: 1rem 0;
  border-bottom: 1px solid var(--line); } article[hidden] { display: none; }
article h3 { font-size: 1rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } article td, article th { font-size: .8rem;
  padding: .1rem .6rem .1rem 0; white-space: nowrap; }
article table { margin-top: .4rem; }
.clips { display: flex; flex-wrap: wrap; gap: .8rem; } .clips figure { margin: 0; }
.tag { font-size: .75rem; border: 1px solid var(--line); border-radius: 9px; padding: 0 .5em; }
.clip { display: block; height: 180px; max-width: 100%; border-radius: 6px; background: var(--soft); }
.tiny { image-rendering: pixelated; } .pair { display: flex; align-self: start; gap: .5rem; padding: .5rem; 
  border-radius: 8px; background: var(--soft); margin-top: -.5rem; } .words { display: block; font-size: .8rem; }
@media (max-width: 760px) { article { grid-template-columns: 1fr; } }
"""

SCRIPT = """
const form = document.forms[0], list = document.querySelector('main'), rows = [...list.children];
const seen = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
  for (const video of target.querySelectorAll('video')) {
    if (isIntersecting) { video.currentTime = 0; video.play().catch(() => {}); } else video.pause();
  }
}), {rootMargin: '200px'});
rows.forEach(row => seen.observe(row));
function choose() {
  const words = form.find.value.toLowerCase(), [key, sign] = form.order.value.split(' ');
  const value = row => row.dataset[key] === undefined ? Infinity : sign * row.dataset[key];
  rows.sort((a, b) => value(a) - value(b) || a.dataset.number - b.dataset.number);
  let count = 0;
  for (const row of rows) {
    row.hidden = !(row.dataset.text.includes(words) && (!form.show.value || row.dataset.is.split(' ')
      .includes(form.show.value)));
    count += !row.hidden;
    list.append(row);
  }
  form.count.value = count + ' of ' + rows.length;
}
form.hidden = false;
form.addEventListener('input', choose);
form.addEventListener('submit', event => event.preventDefault());
choose();
"""
