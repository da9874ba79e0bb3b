"""The page around the report: one HTML file with its style inside and nothing outside. Filled by ``page``."""

from __future__ import annotations

from string import Template

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style
$colors
</style>
</head>
<body>
<main>
<header>
<p class="kicker">$kicker</p>
<h1>$question</h1>
<p class="facts">$facts</p>
<nav>$navigation</nav>
</header>
$sections
<footer>$footer</footer>
</main>
</body>
</html>
"""
)

SECTION = Template('<section id="$anchor">\n<h2>$title</h2>\n$body\n</section>\n')

STYLE = """
:root {
  color-scheme: light dark;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  --page: #f6f7f8; --good: #00724f; --bad: #b34700; --wash: #eef1f4;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #0e1012; --good: #35c99a; --bad: #ff9055; --wash: #1c2126; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1160px; margin: 0 auto; padding: 56px 28px 72px; }
header { max-width: 860px; margin-bottom: 40px; }
.kicker { margin: 0 0 10px; color: var(--muted); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 0 0 14px; font-size: 34px; line-height: 1.2; font-weight: 650; text-wrap: balance; }
.facts { margin: 0 0 18px; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
nav a, a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 3px; }
section { margin: 0 0 52px; }
h2 { margin: 0 0 14px; font-size: 21px; font-weight: 650; letter-spacing: -.01em; }
h3 { margin: 26px 0 10px; font-size: 16px; font-weight: 650; }
p, ul { max-width: 82ch; margin: 0 0 14px; }
ul { padding-left: 1.15em; } .found { max-width: none; font-size: 15px; } li { margin-bottom: 5px; }
.findings { max-width: 92ch; list-style: none; padding: 20px 24px; margin: 0; background: var(--paper);
  border: 1px solid var(--grid); border-radius: 10px; }
.findings li { padding-left: 16px; border-left: 3px solid var(--grid); margin-bottom: 12px; }
.findings li:last-child { margin-bottom: 0; } .findings .caution { border-color: var(--bad); }
.evidence { color: var(--muted); font-size: 13px; white-space: nowrap; }
.note { color: var(--muted); font-size: 14px; }
.scope { border-left: 3px solid var(--muted); padding: 2px 0 2px 18px; }
.scope p:last-child { margin-bottom: 0; }
.scroll, figure, .card, details { background: var(--paper); border: 1px solid var(--grid); border-radius: 10px; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: left; vertical-align: top; }
thead th { font-weight: 600; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th small, td small { display: block; color: var(--muted); font-weight: 400; font-size: 12px; white-space: nowrap; }
tbody th small { padding-left: 19px; white-space: normal; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--grid); }
tbody th { font-weight: 600; white-space: nowrap; }
.wide th, .wide td { padding: 8px 9px; } .wide thead th, .wide th small { white-space: normal; vertical-align: bottom; }
.wide tbody th { min-width: 9.5em; } .wide tbody th small { max-width: 30ch; }
td.number, th.number { text-align: right; white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
.dot.none { border: 1.5px solid var(--muted); }
.grid, .statements { display: grid; gap: 16px; margin-bottom: 14px; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: 10px 10px 4px; }
figure svg { display: block; width: 100%; height: auto; }
.single { max-width: 560px; margin-bottom: 14px; }
.statements { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.card { padding: 16px 18px; }
.card p { margin: 0 0 8px; font-size: 15px; } .card p:last-child { margin: 0; }
.prompt { font-family: var(--mono); font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
.responses { list-style: none; margin: 0; padding: 0; font-family: var(--mono); font-size: 13px; }
.responses li { display: flex; gap: 8px; margin: 0 0 3px; }
.responses span:nth-child(2) { overflow-wrap: anywhere; white-space: pre-wrap; flex: 1; }
.responses .count { color: var(--muted); white-space: nowrap; }
.valid { color: var(--good); } .invalid { color: var(--bad); }
.status { white-space: nowrap; } .status.done { color: var(--good); }
.status.failed, .status.interrupted { color: var(--bad); }
details { margin: 0 0 8px; }
summary { cursor: pointer; padding: 10px 16px; font-size: 15px; }
details table { border-top: 1px solid var(--grid); } details td, details th { padding: 5px 16px; }
code, .value { font-family: var(--mono); font-size: 12.5px; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; border-top: 1px solid var(--grid); padding-top: 16px; }
@media print {
  :root { color-scheme: light; }
  body { background: none; font-size: 10.5pt; } main { padding: 0; max-width: none; }
  nav, .evidence { display: none; } .findings { padding: 8pt 12pt; }
  h1 { font-size: 22pt; } section { margin-bottom: 22pt; }
  figure, .card, tr, details { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .grid { grid-template-columns: 1fr 1fr; gap: 8pt; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: 4pt 5pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
