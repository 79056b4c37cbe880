"""`fastjem report`: the page of a run written anew, or one page for several runs."""

from dataclasses import dataclass, field

from fastjem.report import compare, write


@dataclass
class ReportOptions:
    """What a run did: its report.html written anew; of several runs one page with all of them side by side."""

    runs: list[str] = field(metadata={"positional": True, "help": "folders of runs"})
    out: str | None = field(
        default=None, metadata={"help": "the page; without it RUN/report.html, or report.html here for several runs"}
    )


def main(options: ReportOptions) -> int:
    if len(options.runs) == 1 and options.out is None:
        print(write(options.runs[0]))
    else:
        print(compare(options.runs, options.out or "report.html"))
    return 0
