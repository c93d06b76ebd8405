"""Drafts as data: token trees and chains, and calculations on them."""
