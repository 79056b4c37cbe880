"""Images in: recipes (data only), who draws their parameters, folders, and a loader on the CPU.

The loader needs torchvision and Pillow and is imported by name: `from fastjem.data.loader import ViewLoader`.
"""

from fastjem.data.views import RECIPES, Recipe, Views, ViewSpec

__all__ = ["RECIPES", "Recipe", "ViewSpec", "Views"]
