"""The recipes that ship, as YAML files; :mod:`grouprl.lm.run.recipe` reads them."""
