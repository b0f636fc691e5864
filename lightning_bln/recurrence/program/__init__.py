"""A cell's step as a program: recorded once, differentiated, and run by the compiled library."""
