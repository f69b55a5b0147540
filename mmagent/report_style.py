"""The style sheet of ``report.html``: light and dark, wide and narrow, on paper."""

CSS = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1b1f27; --soft: #5b6472; --rule: #e3e5ea; --shade: #f0f1f4;
  --s1: #2f55d4; --s2: #b4570a; --s3: #0b7a75; --s4: #7a3fb0; --good: #157347; --bad: #bb2d2b; --mute: #9aa3b2; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101216; --card: #181b21; --ink: #e9ebf0; --soft: #a2abb9; --rule: #2b303a; --shade: #22262e;
  --s1: #86a3ff; --s2: #f2a35e; --s3: #4fcac3; --s4: #c79bf2; --good: #5bc98d; --bad: #ff8580; --mute: #667082; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 52px 0 4px; }
h3 { font-size: 1rem; margin: 28px 0 10px; }
p { margin: 6px 0 14px; max-width: 74ch; }
a { color: var(--s1); }
.soft, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 16px 0 0; font-size: 0.92rem; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 14px; margin: 26px 0 8px;
  padding: 0; }
.tile, .panel, .example { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile { padding: 14px 18px 15px; }
.tile dt { color: var(--soft); font-size: 0.86rem; margin: 0; }
.tile dd { margin: 0; }
.tile .big { font-size: 1.85rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tile .note { color: var(--soft); font-size: 0.84rem; line-height: 1.4; }
.tile.main { border-color: var(--s1); }
.tile.main .big { color: var(--s1); }
.panel { padding: 18px 20px; margin: 14px 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px;
  align-items: start; }
.pair .panel { margin: 0; }
figure { margin: 0; }
figcaption { font-size: 0.88rem; line-height: 1.45; margin-top: 10px; max-width: 74ch; }
figure h3 { margin: 0 0 8px; }
.scroll { overflow-x: auto; max-width: 100%; }
.tall { max-height: 560px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
figcaption.above { margin: 0 0 8px; }
.panel > h3 { margin-top: 0; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
thead th { color: var(--soft); font-weight: 550; font-size: 0.84rem; vertical-align: bottom;
  white-space: normal; line-height: 1.3; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
tbody th { font-weight: 550; }
tbody tr:last-child > * { border-bottom: 0; }
td small { color: var(--soft); }
.chart { display: block; width: 100%; height: auto; max-width: 720px; font-size: 12px; }
.chart.wide { max-width: none; min-width: 760px; }
.chart text { fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums; }
.chart .label { fill: var(--ink); } .chart .row { fill: var(--ink); font-size: 13px; }
.chart .rule { stroke: var(--rule); stroke-width: 1; fill: none; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .line.s1 { stroke: var(--s1); } .chart .line.s2 { stroke: var(--s2); } .chart .line.s3 { stroke: var(--s3); }
.chart .line.s4 { stroke: var(--s4); } .chart .line.other { stroke: var(--mute); stroke-width: 1.4; }
.chart .mark.s1 { fill: var(--s1); } .chart .mark.s2 { fill: var(--s2); } .chart .mark.s3 { fill: var(--s3); }
.chart .mark.s4 { fill: var(--s4); } .chart .mark.other { fill: var(--mute); }
.chart .hollow { fill: var(--card); stroke-width: 2; } .chart .hollow.s2 { stroke: var(--s2); }
.chart .hollow.s3 { stroke: var(--s3); } .chart .hollow.s4 { stroke: var(--s4); }
.chart .whisker { stroke-width: 3; stroke-linecap: round; opacity: 0.5; fill: none; }
.chart .whisker.s1 { stroke: var(--s1); } .chart .whisker.s2 { stroke: var(--s2); }
  .chart .whisker.s3 { stroke: var(--s3); }
.chart .whisker.s4 { stroke: var(--s4); }
.chart .bar.s1 { fill: var(--s1); opacity: 0.75; } .chart .bar.muted { fill: var(--mute); }
.chart .gap { fill: var(--bad); opacity: 0.45; }
.chart .diagonal { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; }
.chart .cell { fill: var(--shade); } .chart .cell.right { fill: var(--s1); } .chart .cell.wrong { fill: var(--bad); }
.chart .count { fill: var(--ink); font-size: 11px; } .chart .count.on-dark { fill: var(--card); }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 0 0 10px; padding: 0;
  font-size: 0.88rem; color: var(--soft); }
.key li::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 8px;
  border-radius: 50%;
  border: 2px solid currentColor; vertical-align: -1px; }
.key .s1::before { border-color: var(--s1); background: var(--s1); } .key .s2::before { border-color: var(--s2); }
.key .s3::before { border-color: var(--s3); } .key .s4::before { border-color: var(--s4); }
.key.dots .s2::before { border-radius: 1px; transform: rotate(45deg) scale(0.82); }
.key.dots .s3::before { border-radius: 1px; transform: scale(0.9); }
.key.lines li::before { border-radius: 2px; width: 16px; height: 0; border-width: 2px 0 0; vertical-align: 4px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px;
  align-items: start; }
.example { padding: 14px; border-left: 4px solid var(--good); }
.example.wrong { border-left-color: var(--bad); }
.example .top { display: flex; gap: 14px; align-items: flex-start; }
.example img { width: 104px; height: 104px; object-fit: contain; border-radius: 8px; border: 1px solid var(--rule);
  flex: none;
  background: var(--shade); }
.example img.small { image-rendering: pixelated; }
.example .asked { margin: 0; font-weight: 550; overflow-wrap: anywhere; white-space: pre-line; }
.example .asked.spoken { font-style: italic; }
.example audio { width: 100%; height: 36px; margin: 10px 0 0; }
.example .side { min-width: 0; flex: 1; }
.verdict { margin: 12px 0 8px; font-size: 0.93rem; overflow-wrap: anywhere; }
.verdict b.ok { color: var(--good); } .verdict b.no { color: var(--bad); }
.bars { display: grid; grid-template-columns: minmax(56px, auto) 1fr auto; gap: 4px 10px; align-items: center;
  margin: 0;
  font-size: 0.86rem; font-variant-numeric: tabular-nums; }
.bars dt { margin: 0; max-width: 130px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars dd { margin: 0; } .bars .track { background: var(--shade); border-radius: 4px; height: 9px; overflow: hidden; }
.bars .fill { background: var(--mute); height: 100%; } .bars .is-truth .fill { background: var(--good); }
.bars .is-said .fill { background: var(--bad); } .bars .value { color: var(--soft); text-align: right; }
.passage { margin: 0 0 8px; font-weight: 500; overflow-wrap: anywhere; white-space: pre-line; }
mark { background: none; color: inherit; border-bottom: 3px solid var(--s1); padding: 0 2px 1px; }
mark small { color: var(--soft); margin-left: 5px; font-size: 0.72rem; }
mark.ok { border-color: var(--good); } mark.no { border-color: var(--bad); }
mark.missed { border-bottom: 3px dashed var(--good); }
.chips { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0 0 8px; padding: 0; font-size: 0.86rem; }
.chips li { border: 1px solid var(--rule); border-radius: 99px; padding: 1px 11px; overflow-wrap: anywhere; }
.chips .ok { border-color: var(--good); color: var(--good); }
.chips .no { border-color: var(--bad); color: var(--bad); }
.chips .missed { border: 1px dashed var(--good); }
.ranking { margin: 0 0 8px; padding-left: 26px; font-size: 0.9rem; overflow-wrap: anywhere; }
.ranking .ok { color: var(--good); font-weight: 600; } .ranking small { color: var(--soft); font-weight: 400; }
.chart .faint { opacity: 0.55; }
.task { margin: 44px 0 0; font-size: 1.05rem; }
.about { font-size: 0.8rem; color: var(--soft); margin: 10px 0 0; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 0.88rem; padding-top: 28px; padding-bottom: 60px; }
footer p { max-width: 90ch; }
@media (max-width: 560px) { header, main, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 1.6rem; } .panel { padding: 14px; } }
@media print { body { background: #fff; } nav, audio { display: none; }
  .panel, .example, .tile { break-inside: avoid; } }
"""
