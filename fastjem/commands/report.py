"""`fastjem report`: the page of a run written anew, or one page for several runs."""

import sys
from dataclasses import dataclass, field

from fastjem import fields
from fastjem.printing import say
from fastjem.report import compare, write


@dataclass
class ReportOptions:
    """What a run did: its report.html written anew; of several runs one page with all of them side by side."""

    runs: list[str] = field(metadata={"positional": True, "help": "folders of runs"})
    out: str | None = field(
        default=None,
        metadata={
            "help": "the page; without it RUN/report.html, or report.html here for several runs",
            "path": True,
        },
    )
    data: str | None = field(
        default=None,
        metadata={"help": "where the images are now; links in it are followed; none: where the run says", "path": True},
    )


def main(options: ReportOptions) -> int:
    fields.conform(options, "report: {}".format)
    if len(options.runs) == 1 and options.out is None:
        written = write(options.runs[0], data=options.data)
    else:
        written = compare(options.runs, options.out or "report.html", data=options.data)
    say(written, sys.stdout)
    return 0
