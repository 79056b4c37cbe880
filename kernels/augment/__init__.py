"""Views of images: crops with antialiased resizing, colours, blur. The table of parameters is in columns.py."""

from ..table import Operator

OPERATORS = {
    "augment": Operator(
        "(Tensor images, Tensor parameters, float[] mean, float[] std, ScalarType dtype, bool channels_last,"
        " bool exact, float threshold) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "crop_resize": Operator(
        "(Tensor images, Tensor indices, Tensor parameters, int[2] size, bool bicubic) -> Tensor", cpu=True, gpu=True
    ),
}
