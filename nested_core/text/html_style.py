"""The style of every page: colours as variables, light and dark, readable at a phone's width.

Selectors are specific enough to hold in a notebook, whose own style reaches into its cells.
Colours of text have a contrast of at least 4.5 to their background, those of curves at least 3.
"""

STYLE = """
.nested-tune{--paper:#fff;--panel:#f5f6f8;--ink:#1b1f24;--soft:#57606a;--line:#d5d9de;
--good:#0b6b2e;--bad:#b3261e;--warn:#7a4b00;--heat:31,95,191;
--curve-1:#1f5fbf;--curve-2:#b8500b;--curve-3:#0b7a3e;--curve-4:#8a3ab9;--curve-5:#5f5a00;
--curve-6:#b3246b;--curve-7:#00707a;--curve-8:#6b4a2b;
color-scheme:light dark;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){.nested-tune{--paper:#15181c;--panel:#1f242a;--ink:#e8eaed;
--soft:#a9b2bc;--line:#39414a;--good:#5fd38a;--bad:#ff9a92;--warn:#f0bd6a;--heat:90,150,245;
--curve-1:#7db2ff;--curve-2:#ffa564;--curve-3:#66d394;--curve-4:#d6a1f5;--curve-5:#d8d06a;
--curve-6:#ff8fc0;--curve-7:#5fd0d8;--curve-8:#d3ab84}}
body.nested-tune{margin:0 auto;padding:16px;max-width:1120px;overflow-wrap:anywhere}
.nested-tune h1{font-size:1.25rem;margin:0;font-weight:600}
.nested-tune h2{font-size:1.1rem;margin:2rem 0 .5rem;border-top:1px solid var(--line);
padding-top:1rem}
.nested-tune h3{font-size:.95rem;margin:1rem 0 .25rem}
.nested-tune p{margin:.4rem 0;max-width:75ch;white-space:pre-line}
.nested-tune .verdict{font-size:1.3rem;line-height:1.35;font-weight:600;margin:.5rem 0}
.nested-tune .good{color:var(--good)}.nested-tune .bad{color:var(--bad)}
.nested-tune .warn{color:var(--warn)}
.nested-tune .note,.nested-tune caption,.nested-tune figcaption{color:var(--soft);
font-size:.85rem}
.nested-tune .scroll{overflow-x:auto;margin:.4rem 0}
.nested-tune table{border-collapse:collapse;font-size:.85rem;
font-variant-numeric:tabular-nums;overflow-wrap:normal}
.nested-tune caption{text-align:left;padding:.2rem 0}
.nested-tune caption span{display:inline-block;position:sticky;left:0;
max-width:min(75ch,calc(100vw - 40px))}
.nested-tune .scroll th,.nested-tune .scroll td{padding:.25rem .6rem .25rem 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line);background:none;color:var(--ink)}
.nested-tune .scroll th{font-weight:500}
.nested-tune .scroll thead th{color:var(--soft);white-space:nowrap}
.nested-tune .scroll td.n{text-align:right}
.nested-tune .scroll tbody tr{background:none}
.nested-tune .text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:14rem;max-width:26rem;
display:block}
.nested-tune .charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.nested-tune figure{margin:0;background:var(--panel);border-radius:8px;padding:.75rem;min-width:0}
.nested-tune figure svg{width:100%;height:auto;display:block}
.nested-tune figure.wide{grid-column:1/-1}
.nested-tune .wide .charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.nested-tune .key{display:inline-block;width:1.2em;height:.2em;vertical-align:middle;
margin:0 .3em 0 .8em}
.nested-tune summary{cursor:pointer;color:var(--soft);font-size:.85rem;padding:.35rem 0}
.nested-tune dl>div{margin:.4rem 0}.nested-tune dt{color:var(--soft);font-size:.8rem}
.nested-tune pre{background:var(--panel);color:var(--ink);border-radius:8px;padding:.75rem;
overflow-x:auto;font:.8rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:.4rem 0}
.nested-tune code{background:none;color:inherit;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
font-size:.9em}
.nested-tune .scroll .heat td{text-align:center;padding:.2rem .35rem;border:1px solid var(--paper)}
.nested-tune .scroll .heat thead th{padding-right:.35rem;text-align:center}
@media(max-width:480px){body.nested-tune{padding:12px;font-size:14px}
.nested-tune table{font-size:.75rem}
.nested-tune .scroll th,.nested-tune .scroll td{padding-right:.3rem}
.nested-tune .text{min-width:5.5rem;max-width:17rem}
.nested-tune .verdict{font-size:1.1rem}
.nested-tune .scroll .heat thead th{writing-mode:vertical-rl;text-align:right}}
@media print{.nested-tune .scroll{overflow:visible}}
"""
