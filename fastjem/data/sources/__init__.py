"""Where images come from, one module a format; `fastjem.data.source` opens them."""
