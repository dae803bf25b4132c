"""What every op computes, in float64 and plain torch. Read these first; they share no code with the kernels."""
