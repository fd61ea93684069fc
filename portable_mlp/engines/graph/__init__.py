"""A step as a program: recorded, verified, and the expressions that its values are written in."""
