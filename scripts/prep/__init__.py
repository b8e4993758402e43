"""What prepare.py is made of: reading raw text, training a small tokenizer, writing shards with receipts."""
