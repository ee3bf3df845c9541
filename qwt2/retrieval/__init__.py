"""Sentence encoders: texts as vectors of unit length, whose products say how near the texts are in meaning."""
