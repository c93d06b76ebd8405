"""Planning: which proposers are asked and which draft tokens are verified, by learned acceptance and measured costs."""
