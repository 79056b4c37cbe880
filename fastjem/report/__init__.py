"""`report.html`: what a run did, on one page that needs nothing beside itself; and the views that a recipe makes.

    fastjem.report.write("runs/a")                       # runs/a/report.html
    fastjem.report.compare(["runs/a", "runs/b"], "comparison.html")

A page is a function of the files in the run's folder and of the images they name: `config.yaml`, `metrics.jsonl`, and
what `Watch` leaves there during the run: `environment.json`, `knn.jsonl`, `embeddings.npz`.
"""

from fastjem.report.page import compare, write
from fastjem.report.views import draw_views
from fastjem.report.watch import Watch

__all__ = ["Watch", "compare", "draw_views", "write"]
