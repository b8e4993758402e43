"""`grow plan`: when and how much to grow, what it costs, and the rules that disagree."""
