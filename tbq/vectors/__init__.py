"""Golden vectors for kernel authors: cases, the rule each is compared by, and what a bug is called.

    tests = cases([tbq.get_format("tbq3_0")], ["quantize"])
    found = [compare(case, my_kernel(case.inputs["x"])) for case in tests]
    bugs = diagnose(found)

Nothing here touches a file; `tbq-vectors` writes cases to disk and reads outputs from there.
"""

from tbq.vectors.cases import GRAPH_OPERATIONS, OPERATIONS, Case, cases, quantize_case
from tbq.vectors.diagnosis import BUGS, Diagnosis, diagnose
from tbq.vectors.inputs import Input, inputs
from tbq.vectors.match import EXACT, ROUNDING, WRONG, Comparison, compare, format_name
from tbq.vectors.notes import NOTES

__all__ = [
    "BUGS",
    "EXACT",
    "GRAPH_OPERATIONS",
    "NOTES",
    "OPERATIONS",
    "ROUNDING",
    "WRONG",
    "Case",
    "Comparison",
    "Diagnosis",
    "Input",
    "cases",
    "compare",
    "diagnose",
    "format_name",
    "inputs",
    "quantize_case",
]
