"""Find a rare token for the identifier of a subject: candidates, measures in the text encoders, ranking."""
