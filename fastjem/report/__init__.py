"""`report.html`: what a run did, on one page that needs nothing beside itself.

    fastjem.report.write("runs/a")                       # runs/a/report.html
    fastjem.report.compare(["runs/a", "runs/b"], "comparison.html")
    fastjem.report.show("runs/a")                        # in a notebook

A page is a function of the files in the run's folder and of the images they name: `config.yaml`, `metrics.jsonl`, and
what `Watch` leaves there during the run: `environment.json`, `knn.jsonl`, `embeddings.npz`.
"""

from fastjem.report.inline import brief, show
from fastjem.report.page import compare, write
from fastjem.report.watch import Watch

__all__ = ["Watch", "brief", "compare", "show", "write"]
