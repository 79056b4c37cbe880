"""The table of parameters that says what becomes of each image, and the names of its columns.

A row of the table is one view of one image, [P] float32, P = 13. `fastjem.data.parameters` draws it; the operators of
this family and every loader read its columns by these names. csrc/ has the same in one enum; a test compares the two.

| column | value | not applied |
|---|---|---|
| TOP, LEFT, HEIGHT, WIDTH | the crop, in pixels of the source (`crop_resize` takes it, `augment` doesn't) | |
| FLIP | 1: left and right are exchanged | 0 |
| BRIGHTNESS, CONTRAST, SATURATION | factors of torchvision's ColorJitter, 0 or more | 1 |
| HUE | shift in turns, -0.5 to 0.5 | 0 |
| ORDER | which of ORDERS the four steps above follow, 0 to 23 | |
| GRAYSCALE | 1: all channels are the gray value | 0 |
| SIGMA | standard deviation of the Gaussian blur in pixels | 0 |
| SOLARIZE | 1: values from the threshold on are inverted | 0 |
"""

import itertools

TOP, LEFT, HEIGHT, WIDTH = 0, 1, 2, 3
FLIP = 4
BRIGHTNESS, CONTRAST, SATURATION, HUE = 5, 6, 7, 8
ORDER = 9
GRAYSCALE = 10
SIGMA = 11
SOLARIZE = 12
COLUMNS = 13  # how many there are

JITTER = ("brightness", "contrast", "saturation", "hue")  # the steps of the columns BRIGHTNESS to HUE
ORDERS = tuple(itertools.permutations(range(4)))  # of the indices in JITTER: (0, 1, 2, 3), (0, 1, 3, 2), ...
GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue
