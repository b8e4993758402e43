"""From a small checkpoint to a large one: layer maps, growth plans, their execution and the reports on them."""
