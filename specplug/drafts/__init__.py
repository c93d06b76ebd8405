"""Drafts as data: token trees and chains, and the arithmetic on them."""
