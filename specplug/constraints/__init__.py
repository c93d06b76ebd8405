"""What a request demands of the text of its answer, checked and prepared for llguidance, without an engine."""
