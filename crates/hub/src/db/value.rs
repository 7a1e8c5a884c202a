//! What goes into statements and comes out of rows, the same for both drivers.

use std::borrow::Cow;

use super::DbError;

/// A parameter of a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// No value.
    Null,
    /// A number; booleans are 0 and 1.
    Integer(i64),
    /// Text.
    Text(Cow<'a, str>),
    /// Bytes.
    Bytes(Cow<'a, [u8]>),
}

/// What may be a parameter.
pub trait ToValue {
    /// It as a parameter.
    fn to_value(&self) -> Value<'_>;
}

impl ToValue for str {
    fn to_value(&self) -> Value<'_> {
        Value::Text(Cow::Borrowed(self))
    }
}

impl ToValue for String {
    fn to_value(&self) -> Value<'_> {
        Value::Text(Cow::Borrowed(self))
    }
}

impl ToValue for Vec<u8> {
    fn to_value(&self) -> Value<'_> {
        Value::Bytes(Cow::Borrowed(self))
    }
}

macro_rules! integer {
    ($($type:ty),+) => {
        $(impl ToValue for $type {
            fn to_value(&self) -> Value<'_> {
                Value::Integer(i64::from(*self))
            }
        })+
    };
}
integer!(i64, u32, bool);

impl<T: ToValue + ?Sized> ToValue for &T {
    fn to_value(&self) -> Value<'_> {
        (**self).to_value()
    }
}

impl<T: ToValue> ToValue for Option<T> {
    fn to_value(&self) -> Value<'_> {
        self.as_ref().map_or(Value::Null, ToValue::to_value)
    }
}

/// The parameters of a statement, in the order of `?1`, `?2`, ….
macro_rules! params {
    ($($param:expr),* $(,)?) => {
        &[$($crate::db::ToValue::to_value(&$param)),*]
    };
}

pub(crate) use params;

/// A column's value as it came.
#[derive(Debug)]
pub enum Cell {
    /// No value.
    Null,
    /// A number.
    Integer(i64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// What a column may be read as.
pub trait Column: Sized {
    /// Takes the value over; nothing if it is of another type.
    fn from_cell(cell: Cell) -> Option<Self>;
}

impl Column for Cell {
    fn from_cell(cell: Cell) -> Option<Self> {
        Some(cell)
    }
}

impl Column for i64 {
    fn from_cell(cell: Cell) -> Option<Self> {
        match cell {
            Cell::Integer(number) => Some(number),
            _ => None,
        }
    }
}

impl Column for u32 {
    fn from_cell(cell: Cell) -> Option<Self> {
        i64::from_cell(cell)?.try_into().ok()
    }
}

impl Column for bool {
    fn from_cell(cell: Cell) -> Option<Self> {
        Some(i64::from_cell(cell)? != 0)
    }
}

impl Column for String {
    fn from_cell(cell: Cell) -> Option<Self> {
        match cell {
            Cell::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl Column for Vec<u8> {
    fn from_cell(cell: Cell) -> Option<Self> {
        match cell {
            Cell::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

impl<T: Column> Column for Option<T> {
    fn from_cell(cell: Cell) -> Option<Self> {
        match cell {
            Cell::Null => Some(None),
            other => T::from_cell(other).map(Some),
        }
    }
}

/// A row of a query's result.
pub struct Row<'r>(pub(super) RowOf<'r>);

pub(super) enum RowOf<'r> {
    Sqlite(&'r rusqlite::Row<'r>),
    Postgres(&'r tokio_postgres::Row),
}

impl Row<'_> {
    /// The column at `index`, from 0.
    ///
    /// # Errors
    /// If there is none, or it is of another type.
    pub fn get<T: Column>(&self, index: usize) -> Result<T, DbError> {
        let cell = match self.0 {
            RowOf::Sqlite(row) => super::sqlite::cell(row, index)?,
            RowOf::Postgres(row) => super::postgres::cell(row, index)?,
        };
        let wanted = std::any::type_name::<T>();
        T::from_cell(cell)
            .ok_or_else(|| DbError::Column { index, source: format!("is no {wanted}").into() })
    }
}
