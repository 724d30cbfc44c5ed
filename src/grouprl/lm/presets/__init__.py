"""The recipes that ship, as YAML files; :mod:`grouprl.lm.recipe` reads them."""
