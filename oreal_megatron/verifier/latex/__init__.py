"""Reading of answers: normalization, notation, structure, and expressions in LaTeX."""
