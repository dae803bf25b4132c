"""Several engines behind one address, on one machine or many: a Ray Serve deployment that routes by prefix."""
