"""How the page looks: in light and in dark, on a phone, on a desk and on paper."""

# Text has a contrast of 4.5 at least to what it stands on, lines and dots have one of 3 (WCAG 2.2, AA).
LIGHT = """
  --paper: #fff; --card: #f5f6f8; --ink: #1b2230; --soft: #565f6e; --line: #c9ced7; --warn: #fff0cf; --edge: #d08700;
  --link: #1d55b3; --on: #fff;
  --run0: #2560c4; --run1: #c04a12; --run2: #0f7660; --run3: #8238ae; --run4: #8a6200; --run5: #b82a62; --run6: #23749f;
  --run7: #5c6472;
  --class0: #3578c8; --class1: #c56a00; --class2: #2f8f40; --class3: #cf4141; --class4: #8c62bd; --class5: #8d6153;
  --class6: #c8559f; --class7: #717a86; --class8: #85800c; --class9: #118494; --class10: #133f7c; --class11: #7a3c00;
  --class12: #0d4d1b; --class13: #7c1717; --class14: #4b2480; --class15: #472a20; --class16: #7d1a5b;
  --class17: #2e3540; --class18: #4a4700; --class19: #004954;"""
DARK = """
  --paper: #13171e; --card: #1c222c; --ink: #e6eaf0; --soft: #a3adbb; --line: #3d4654; --warn: #3a2f16; --edge: #d9a441;
  --link: #7fb0f8; --on: #10141a;
  --run0: #6ea4f4; --run1: #f29364; --run2: #4cc3a7; --run3: #c48be6; --run4: #dcb34e; --run5: #ef80ad; --run6: #7cc4e8;
  --run7: #a3acb9;
  --class0: #4b8ddd; --class1: #dd7d1c; --class2: #3f9f50; --class3: #e05a5a; --class4: #a27bd2; --class5: #a97a6b;
  --class6: #d972b8; --class7: #858e9a; --class8: #a09a20; --class9: #26a0b0; --class10: #a9c9f2; --class11: #f5cb9c;
  --class12: #a5dcae; --class13: #f4b0af; --class14: #d0bce8; --class15: #d3b8af; --class16: #f4c8e3;
  --class17: #cbd1d8; --class18: #e2de92; --class19: #a5e0e9;"""

CSS = f"""
:root {{ color-scheme: light dark; --under: var(--paper);{LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{{DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin: 0 auto; padding: 24px 24px 48px; max-width: 1480px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 36px 0 12px; scroll-margin-top: 12px; }}
h3 {{ font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }} h3 small {{ font-weight: 400; margin-left: 4px; }}
p {{ margin: 4px 0; overflow-wrap: anywhere; }} .note, small {{ color: var(--soft); font-size: 13px; }}
.card > .note, .charts .note {{ max-width: 72ch; }}
a {{ color: var(--link); text-underline-offset: 3px; }}
:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: 2px 20px; list-style: none; padding: 0; margin: 12px 0 0; }}
nav a {{ display: inline-block; padding: 4px 0; }}
.warn {{ background: var(--warn); border-left: 4px solid var(--edge); border-radius: 4px; padding: 8px 14px;
  margin: 8px 0; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }}
.tiles div {{ background: var(--card); border-radius: 8px; padding: 8px 14px; min-width: 96px; }}
.tiles dt {{ color: var(--soft); font-size: 13px; }}
.tiles dd {{ margin: 0; white-space: nowrap; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); gap: 16px; }}
.charts section, .card {{ background: var(--card); border-radius: 8px; padding: 12px 14px; min-width: 0; }}
.charts svg {{ width: 100%; height: auto; display: block; stroke-linejoin: round; }}
.side {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(590px, 100%), 1fr)); gap: 16px; }}
.side .wide {{ grid-column: 1 / -1; }}
.several .side {{ grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }}
.scatter {{ width: 100%; max-width: 900px; height: auto; display: block; }}
.scatter .frame {{ fill: none; stroke: var(--line); }}
.scatter circle {{ stroke: var(--card); stroke-width: .5; }}
.scatter circle:hover {{ stroke: var(--ink); stroke-width: 2; }}
.scatter image.pixels {{ image-rendering: pixelated; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 8px 0;
  font-size: 13px; }}
.legend li {{ overflow-wrap: anywhere; }} .key li {{ display: flex; align-items: baseline; }}
.key svg, .key i {{ flex: none; }}
.key {{ margin: 0 0 14px; gap: 6px 24px; }}
.dot {{ display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }}
.line {{ width: 30px; height: 8px; margin-right: 8px; vertical-align: middle; fill: none; stroke: var(--ink);
  stroke-width: 1.8; }}
.badge {{ display: inline-block; flex: none; min-width: 20px; padding: 0 4px; margin-right: 7px; border-radius: 5px;
  color: var(--on); font: 700 13px/20px system-ui, sans-serif; text-align: center; }}
.card {{ --under: var(--card); }}
.scroll {{ container-type: inline-size; position: relative; }}
.strip {{ overflow-x: auto; scrollbar-color: var(--soft) transparent; scrollbar-width: thin; }}
.hint {{ display: none; color: var(--soft); font-size: 13px; text-align: right; }}
@supports (animation-timeline: --strip) {{
  .scroll {{ timeline-scope: --strip; }} .strip {{ scroll-timeline: --strip inline; }}
  .scroll::after {{ content: ""; display: none; position: absolute; right: 0; top: 24px; bottom: 0; width: 44px;
    pointer-events: none; background: linear-gradient(to right, transparent, var(--under));
    animation: fade linear both; animation-timeline: --strip; }}
  @keyframes fade {{ 0%, 85% {{ opacity: 1; }} 100% {{ opacity: 0; }} }} }}
table {{ border-collapse: collapse; font-size: 14px; }}
th {{ text-align: left; font-weight: 600; color: var(--soft); }}
th, td {{ padding: 4px 18px 4px 0; vertical-align: top; overflow-wrap: anywhere; }}
.config th[scope=row] {{ font-weight: 400; overflow-wrap: normal; min-width: 164px; }}
.config td {{ min-width: 130px; max-width: 90ch; }} .config thead th {{ min-width: 130px; color: var(--ink); }}
.columns {{ columns: 500px; column-gap: 32px; }} .columns tr {{ break-inside: avoid; }}
.several .config tbody tr {{ border-top: 1px solid var(--line); }}
summary {{ cursor: pointer; padding: 8px 0; color: var(--link); width: fit-content; }}
.summary th[scope=row] {{ min-width: 190px; color: var(--ink); }}
.summary thead th {{ vertical-align: bottom; overflow-wrap: normal; font-size: 13px; }}
.summary tbody tr {{ border-top: 1px solid var(--line); }}
.summary td {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.summary th, .summary td {{ padding-right: 14px; }}
.summary div, .config thead div {{ display: flex; align-items: baseline; }}
.images th, .images td {{ padding: 3px 4px; }} .images {{ --cell: 88px; }} .several .images {{ --cell: 64px; }}
.images img {{ display: block; width: 100%; }}
.images td > *, .images th {{ max-width: var(--cell); }} .images td {{ width: calc(var(--cell) + 8px); }}
.images td {{ min-width: calc(var(--cell) + 8px); }}
.even img {{ height: var(--cell); object-fit: cover; }}
.images img.pixels {{ image-rendering: pixelated; }}
.images .query {{ padding-right: 12px; position: sticky; left: 0; background: var(--under); }}
.images small {{ display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.images td.other img {{ outline: 3px solid var(--run1); outline-offset: -2px; }}
.gone {{ width: var(--cell); height: var(--cell); border: 1px dashed var(--soft); color: var(--soft); display: grid;
  place-content: center; text-align: center; font-size: 13px; }}
@media (max-width: 600px) {{ body {{ padding: 16px 16px 32px; }} h1 {{ font-size: 21px; }}
  .tiles {{ gap: 8px; }} .tiles div {{ flex: 1 1 40%; }} .tiles dd {{ font-size: 16px; }} nav a {{ padding: 8px 0; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 12px; }} nav, .hint {{ display: none; }}
  .charts {{ grid-template-columns: 1fr 1fr; }} .side, .several .side {{ grid-template-columns: 1fr; }}
  .images, .several .images {{ --cell: 62px; }} .scatter {{ max-width: 480px; }} .columns {{ columns: 2; }}
  table, .summary thead th {{ font-size: 10px; }} th, td {{ padding-right: 8px; }}
  .summary th[scope=row] {{ min-width: 110px; }}
  .summary td {{ white-space: normal; }} .config th[scope=row], .config td, .config thead th {{ min-width: 0; }}
  .charts section, .card, tr {{ break-inside: avoid; }} h2, h3 {{ break-after: avoid; }}
  .strip {{ overflow: visible; }} * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
"""
