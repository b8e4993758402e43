"""The report on finished runs: one dict of facts, from which figures and a self-contained page are drawn."""
