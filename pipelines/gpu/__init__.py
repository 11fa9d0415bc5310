"""`make gpu`: tests and measurements on a CUDA card, in pieces of two minutes; nothing of it is imported by other rooms."""
