//! Which variant fits a device: predicted memory against the budget.
