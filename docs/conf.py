"""How Sphinx builds the documentation."""

from importlib.metadata import version as installed

project = "portable_mlp"
copyright = "the portable_mlp developers"
version = release = installed("portable_mlp")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say them
autodoc_default_options = {"members": True, "inherited-members": True}
default_role = "code"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "pydata_sphinx_theme"
html_title = f"portable_mlp {version}"
html_copy_source = html_show_sourcelink = False
html_sidebars = {"[!a]*": [], "architecture": []}  # only the API reference has pages below it
html_theme_options = {
    "header_links_before_dropdown": 9,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
}


def skip_foreign(app, what, name, member, skip, options):
    """Leave out what classes inherit from other libraries."""
    function = getattr(member, "func", getattr(member, "fget", member))
    home = getattr(function, "__module__", None) or ""
    return not home.startswith("portable_mlp") or skip


def setup(app):
    """Register the hook."""
    app.connect("autodoc-skip-member", skip_foreign)
