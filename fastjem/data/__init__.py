"""From images to batches of views.

`source` opens what the user named; `loaders` read it in an order that is ours, and cut crops; `batch.finish` does the
colours and masks. `views` says what is done (recipes, data only), `parameters` and `masks` draw how much of it, and
`pixels` is how numbers are made of pixels. Modules are imported by name: recipes alone need neither torch nor Pillow.
"""

from fastjem.data.views import RECIPES, Recipe, Views, ViewSpec

__all__ = ["RECIPES", "Recipe", "ViewSpec", "Views"]
