"""Operations that are worth more than their plain form: one interface each, with a plain reference beside it."""
