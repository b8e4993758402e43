"""Zero-shot evaluation: tasks as YAML files, their prompts and metrics those of lm-evaluation-harness."""
