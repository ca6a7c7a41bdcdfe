"""What every cell of the composition table must be."""

from tests.compositions.rows import Row

NEEDS_DERIVATIVE = {
    "autocast": False,
    "checkpoint": True,
    "checkpoint, reentrant": True,
    "saved-tensor hooks": True,
    "second derivative": True,
    "forward mode": True,
    "vmap": True,
    "func.grad": True,
    "vmap(grad)": True,
    "jacrev(jacrev)": True,
    "is_grads_batched": True,
    "backward twice": True,
    "some gradients": True,
    "compiled func.grad": True,
}


def applies(row: Row, column: str) -> bool:
    if NEEDS_DERIVATIVE.get(column) and not row.derivative:
        return False
    if column == "deepcopy, pickle" and row.build is None:
        return False
    if column in ("one tensor twice", "one tensor twice, compiled") and not row.same:
        return False
    if column == "inductor" and not row.inductor:
        return False
    return True
