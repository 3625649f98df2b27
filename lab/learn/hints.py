"""Three hints for each exercise, from a nudge to nearly the answer: {exercise: three for both languages},
or {exercise: {language: three}} where the twins need other ones."""

HINTS = {
    "tail_mask": (
        "Take 4 rows of 40 by hand: which numbers does the second step of row 0 read? Whose are they?",
        "Columns 40 to 63 of row 0 are row 1's. The lanes that would read them must do something else.",
        "In CUDA, add only if col < cols. In Triton, give tl.load a mask, and what masked lanes return.",
    ),
    "coalescing": {
        "cuda": (
            "Write down the addresses that lanes 0, 1, 2 of a warp load with i = 0.",
            "They are 16 bytes apart, so 32 lanes span 512 bytes. For one line they must be 4 bytes apart.",
            "threadIdx.x must be what is added with factor 1. What a thread's i is multiplied with is the "
            "number of threads.",
        ),
        "triton": (
            "Write down the first elements of program 0. How far apart are they?",
            "Programs take turns, element by element, so neighbours belong to different programs.",
            "Program p begins at p * BLOCK, and its elements follow each other.",
        ),
    },
    "bank_conflict": {
        "cuda": (
            "The bank of a float is its index in shared memory modulo 32. What is that of tile[lane][0]?",
            "lane * 32 modulo 32 is 0 for every lane. The length of a row decides; the loops can stay.",
            "With rows of 33 floats, tile[lane][row] is in bank (lane + row) % 32.",
        ),
        "triton": (
            "How many rows of x has a tile, and how many numbers of each does it use?",
            "A row's piece must be a whole line: 128 bytes are 32 numbers. The same holds for y.",
            "Only the sizes of the tile are wrong: R, C = 32, 32.",
        ),
    },
    "barrier": {
        "cuda": (
            "The barrier makes sure that a tile is complete before it is read. What follows after the read?",
            "The next turn of the loop writes the same shared memory. Must it wait for anything?",
            "A second __syncthreads() at the end of the loop's body.",
        ),
        "triton": (
            "Suppose that program 0 runs alone, first. Which entries of `sums` exist when it reads them?",
            "Between programs of one launch there is no barrier. What happens between two launches?",
            "A kernel that only stores the sums, then one that reads them: two calls of launch().",
        ),
    },
    "rescale": (
        "Compute the weights of the scores 0 and 10 by hand, in two steps of one score each.",
        "After the first step the sum is exp(0 - 0) = 1; after the second, that term should be exp(0 - 10).",
        "Before you add, multiply both sums by exp(old maximum - new maximum).",
    ),
    "empty_split": (
        "What are `sum` and `weight` of a split without a token?",
        "0 / 0 is NaN, and 0 * NaN is NaN, too. A weight of zero does not remove it.",
        "Divide only if the weight is not zero, and publish 0 otherwise.",
    ),
    "page_lookup": (
        "With pages of 16, which page holds token 20, and which page does its tile look up?",
        "The lookup uses the first token of the tile. Each lane, or element, has a token of its own.",
        "The index into the table must be t / page_size instead of t0 / page_size, and only a token below "
        "the length has an entry there.",
    ),
    "grouped_queries": (
        "Count the loads of key 0 over the whole kernel.",
        "All four queries must be at hand where a key is: in registers, before the keys are read.",
        "In CUDA, exchange the loops and keep query[kGroup]. In Triton, a program takes HEADS = all heads, "
        "and the grid has one program along them.",
    ),
    "rounding_point": (
        "Write both formulas with round() wherever a result is stored. Where does the fused kernel lack one?",
        "The second kernel multiplied what the first one had stored, not the sum itself.",
        "Round the sum, store that, widen it again, and multiply that.",
    ),
    "stages": {
        "cuda": (
            "Count the groups that are committed when tile 0 is read, and say which one holds tile 0.",
            "There are kStages - 1 of them, and tile t is the oldest. All but the oldest may be in flight.",
            "cp_async_wait<kStages - 2>. The number says how many groups may still be in flight.",
        ),
        "triton": (
            "A tile has ROWS * K float32 numbers. What is in flight during a step, if there are n stages?",
            "16 KiB a tile; n - 1 tiles are in flight, and 25 KB are needed.",
            "num_stages=3 has two tiles in flight.",
        ),
    },
    "counter": (
        "Which tickets do the blocks of the second launch draw?",
        "They begin where the first launch ended. Someone must set the counter back when nobody needs it.",
        "The block with the last ticket knows that all others have drawn theirs: it stores 0.",
    ),
    "dependent_launch": (
        "Two things are read before the wait. Which of them does another kernel write?",
        "Weights may be read early, activations not.",
        "Move the load of x behind the wait, and leave that of w before it.",
    ),
}


def of(exercise: str, language: str) -> tuple[str, ...]:
    """The hints of an exercise in a language."""
    hints = HINTS[exercise]
    return hints[language] if isinstance(hints, dict) else hints
