"""Schemas of the tables that studies write; they are written and read as all tables are."""

import pyarrow as pa

Rows = list[list[str]]
"""A table as text: the first row names the columns."""

COMPARISON = pa.schema(
    [
        pa.field(
            "search", pa.string(), metadata={"about": "name in the settings, of one search or of its repetitions"}
        ),
        pa.field("quantity", pa.string(), metadata={"about": "as in perplexity, KL, a task, tokens"}),
        pa.field("of", pa.string(), metadata={"about": "data set, metric or unit"}),
        pa.field("better", pa.string(), metadata={"about": "low, high, or nothing"}),
        pa.field("digits", pa.int32(), metadata={"about": "decimals worth showing"}),
        pa.field("mean", pa.float64()),
        pa.field("spread", pa.float64(), metadata={"about": "sample standard deviation; NaN of a single search"}),
        pa.field("n", pa.int32(), metadata={"about": "searches"}),
    ]
)

CONVERGENCE = pa.schema(
    [
        pa.field("switches", pa.string(), metadata={"about": "of each offspring: a number, or drawn"}),
        pa.field("units", pa.int32()),
        pa.field("kept", pa.int32(), metadata={"about": "units at the upper of two levels"}),
        pa.field("offspring", pa.int32(), metadata={"about": "lambda"}),
        pa.field("seed", pa.int32()),
        pa.field("bound", pa.float64(), metadata={"about": "kept x (units - kept) / offspring"}),
        pa.field("generations", pa.int64(), metadata={"about": "to the optimum"}),
    ]
)

MONOTONICITY_CANDIDATES = pa.schema(
    [
        pa.field("candidate", pa.int32()),
        pa.field(
            "base", pa.int32(), metadata={"about": "candidate that this one keeps strictly more than; -1 if none"}
        ),
        pa.field("error", pa.float64(), metadata={"about": "sum of the errors of its units alone"}),
        pa.field("cost", pa.int64(), metadata={"about": "what the budget counts, as in bits x weights"}),
        pa.field("fitness", pa.float64(), metadata={"about": "on the text that pairs are looked for on"}),
        pa.field("levels", pa.list_(pa.int16()), metadata={"about": "of each unit, by rising cost"}),
    ]
)

MONOTONICITY_PAIRS = pa.schema(
    [
        pa.field("claim", pa.string(), metadata={"about": "errors: less summed error is better; kept: more kept is"}),
        pa.field("favoured", pa.int32(), metadata={"about": "candidate that should be better"}),
        pa.field("other", pa.int32()),
        pa.field("favoured_error", pa.float64()),
        pa.field("other_error", pa.float64()),
        pa.field("favoured_fitness", pa.float64(), metadata={"about": "on tokens that the pair was not found on"}),
        pa.field("other_fitness", pa.float64()),
        pa.field("difference", pa.float64(), metadata={"about": "mean over sequences of favoured - other"}),
        pa.field("stderr", pa.float64(), metadata={"about": "standard error of that mean"}),
        pa.field("t", pa.float64(), metadata={"about": "difference / stderr"}),
        pa.field("sequences", pa.int32()),
        pa.field("confirmed", pa.bool_(), metadata={"about": "t reaches what the study asks for"}),
    ]
)
