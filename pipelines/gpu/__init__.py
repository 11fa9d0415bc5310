"""`make gpu`: what a card has to show, in pieces of two minutes; nothing of it is imported by the rest of the program."""
