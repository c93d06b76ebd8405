"""Planning: chooses the proposers to ask and the draft tokens to verify, by learned acceptance and measured costs."""
