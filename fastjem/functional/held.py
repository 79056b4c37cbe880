"""Whether scores against prototypes are held in memory, or made in tiles, twice: the one rule of all losses on them."""

# Bytes of a step's scores and their gradients beyond which they aren't held. On two AVX-512 cores, float32, a DINO step
# of a small encoder (2 + 8 views, features of 256) then takes 0.64 of the time at 1,475 MiB (256 images against 65,536
# prototypes) and 0.92 to 1 at 369 and 184 (64 against 65,536, 256 against 8,192). Below, holding them is faster: at 46
# MiB (64 against 8,192) the tiles take 1.2 times as long.
LARGEST_SCORES = 160 << 20

# Prototypes from which on no scores are held, of however few images: memory doesn't follow rows times prototypes then.
# It costs time where the batch is small. One thread of a loaded machine, head and loss alone, float32, features of 256,
# 10 views, tiles over held scores: 8 images 2.8 at 8,192 prototypes, 1.5 at 32,768, 1.6 at 65,536; 64 images 1.4, 1.1,
# 1.1. Nothing is won in time at 32,768 either, and what is held there is below 160 MiB by the rule above: hence 65,536.
MANY_PROTOTYPES = 65_536


def scores_fit(student_rows: int, teacher_rows: int, prototypes: int, element: int) -> bool:
    """Whether the scores [rows, K] of both sides, and the gradients of the student's, are few enough to be held.

    element: bytes of a score.
    """
    if prototypes >= MANY_PROTOTYPES:
        return False
    return (2 * student_rows + teacher_rows) * prototypes * element <= LARGEST_SCORES
