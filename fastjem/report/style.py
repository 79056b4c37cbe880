"""How the page looks, in light and in dark."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1c2330; --soft: #5d6675; --line: #d5d9e0; --warn: #fff2d8;
  --run0: #2563c9; --run1: #d0571f; --run2: #14866d; --run3: #8a3fb5; --run4: #a8790a; --run5: #c0336f;
  --run6: #3a8bb8; --run7: #6b7280;
  --class0: #3578c8; --class1: #e58a26; --class2: #3a9c4b; --class3: #cf4141; --class4: #8c62bd; --class5: #8d6153;
  --class6: #d972b8;
  --class7: #7f8894; --class8: #b0a91f; --class9: #26adbd; --class10: #7ea9dd; --class11: #f0b777;
  --class12: #83c98e; --class13: #ea8f8c;
  --class14: #b79bd8; --class15: #b8968b; --class16: #eeaed7; --class17: #b4bbc4; --class18: #d3ce6d;
  --class19: #86d3dd; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181f; --card: #1c222c; --ink: #e4e8ee; --soft: #9aa4b2; --line: #39424f; --warn: #423418;
  --run0: #6ea4f4; --run1: #f29364; --run2: #4cc3a7; --run3: #c48be6; --run4: #dcb34e; --run5: #ef80ad;
  --run6: #7cc4e8; --run7: #a3acb9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1480px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 36px 0 12px; } h3 {
  font-size: 15px; margin: 0 0 4px; }
p { margin: 4px 0; } .note, small { color: var(--soft); font-size: 13px; } a { color: var(--run0); }
.warn { background: var(--warn); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 8px 16px; } .tiles b { display: block;
  font-size: 19px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 16px; }
.charts section, .card { background: var(--card); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.charts svg { width: 100%; height: auto; display: block; }
.side { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(680px, 100%), 1fr)); gap: 16px; }
.side .wide { grid-column: 1 / -1; }
.scatter { width: 100%; max-width: 900px; height: auto; font: 13px system-ui, sans-serif; fill: var(--ink);
  display: block; }
.scatter .frame { fill: none; stroke: var(--line); } .scatter circle { fill-opacity: .8; } .scatter circle:hover {
  stroke: var(--ink); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; padding: 0; margin: 8px 0 0;
  font-size: 13px; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; } th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 3px 18px 3px 0; vertical-align: top; overflow-wrap: anywhere; } .config td:first-child {
  color: var(--soft); white-space: nowrap; }
.config tr.differs td { background: var(--warn); }
.images th, .images td { padding: 3px 4px; white-space: nowrap; } .even td { width: 104px; }
.images img { display: block; width: 96px;
  image-rendering: auto; }
.even img { height: 96px; object-fit: cover; }
.images img.pixels { image-rendering: pixelated; } .images td.query { padding-right: 12px; }
.images small { display: block; max-width: 96px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.images td.other img { outline: 2px solid var(--run1); outline-offset: -1px; } .gone { width: 96px; height: 96px;
  border: 1px dashed var(--line); color: var(--soft); text-align: center; line-height: 96px; }
"""
