"""The style sheet of the HTML report, light and dark."""

CSS = """
:root {
  --ink: #1b1f27; --soft: #5d6673; --line: #e3e6eb; --page: #f6f7f9;
  --card: #ffffff; --accent: #1f66b8; --tint: #eef4fc;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ee; --soft: #9aa4b2; --line: #2d333d; --page: #14171c;
    --card: #1c2027; --accent: #6cb0ff; --tint: #1b2838;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 1000px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
header > p { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: 4px 0 22px; font-size: 30px; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 16px; font-size: 19px; font-weight: 650; }
h3 { margin: 0 0 6px; font-size: 13px; color: var(--soft); font-weight: 600; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { margin: 20px 0; padding: 22px 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile { padding: 16px 18px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; color: var(--accent); }
.tile span { display: block; margin-top: 4px; font-size: 13.5px; line-height: 1.4; color: var(--soft); }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 8px; }
tbody tr:last-child :is(td, th) { border-bottom: 0; }
tr.final td { background: var(--tint); font-weight: 600; }
.pairs th, .pairs td { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.pairs th { width: 30%; }
.pairs td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
section > h3 { margin-top: 26px; }
figure { margin: 26px 0 0; color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption, .hint { margin: 8px 0 0; font-size: 13.5px; color: var(--soft); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.sample { padding: 14px 16px; border: 1px solid var(--line); border-radius: 10px; background: var(--page); }
.sample p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; }
.prompt { color: var(--soft); }
pre {
  margin: 0; padding: 14px 16px; white-space: pre-wrap; overflow-wrap: anywhere;
  border-radius: 10px; background: var(--page); border: 1px solid var(--line);
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
