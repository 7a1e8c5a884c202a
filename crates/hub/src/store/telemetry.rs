//! What devices count in use, in SQL: one row for each release, class and site in each hour, and
//! later in each day, however many devices there are.

use std::collections::BTreeMap;

use jiff::Timestamp;
use slmops_api::device::DeviceReport;
use slmops_api::telemetry::{Span, TelemetryQuery, TelemetrySeries};

use super::StoreError;
use super::sql::{collect, column, first, from_json, to_json};
use crate::db::{Row, Tx, params};
use crate::telemetry::{Counts, Group, Keep};

/// Rows of one hour or day that tell sites apart; what comes beyond them is counted under
/// [`OTHER_SITES`].
const MAX_ROWS: i64 = 500;
/// No site is called so.
const OTHER_SITES: &str = "*";

/// The table of its migration. A device without a site has an empty one.
pub(super) const TABLE: &str = "
    CREATE TABLE telemetry (
        span_s INTEGER NOT NULL,
        start_s INTEGER NOT NULL,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        class TEXT NOT NULL,
        site TEXT NOT NULL,
        counts TEXT NOT NULL,
        PRIMARY KEY (span_s, start_s, model, version, class, site)
    ) STRICT, WITHOUT ROWID;
";

/// Whose counts a row is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    model: String,
    version: String,
    class: String,
    site: String,
}

/// Adds what a report counts beyond the one before it to the hour.
pub(super) fn add(
    tx: &Tx<'_>,
    at: Timestamp,
    group: Option<&Group>,
    before: Option<&DeviceReport>,
    report: &DeviceReport,
) -> Result<(), StoreError> {
    let (Some(running), Some(counts)) = (&report.running, Counts::of(before, report)) else {
        return Ok(());
    };
    let site = group.and_then(|group| group.site.as_ref());
    let key = Key {
        model: running.model.to_string(),
        version: running.version.to_string(),
        // One that joined a moment ago is of no class yet.
        class: group.map(|group| group.class.to_string()).unwrap_or_default(),
        site: site.map(|site| site.to_string()).unwrap_or_default(),
    };
    put(tx, Span::Hour, start_s(at, Span::Hour), key, counts)
}

fn start_s(at: Timestamp, span: Span) -> i64 {
    at.as_second().div_euclid(span.seconds()) * span.seconds()
}

fn put(
    tx: &Tx<'_>,
    span: Span,
    start_s: i64,
    mut key: Key,
    mut counts: Counts,
) -> Result<(), StoreError> {
    let mut known = read(tx, span, start_s, &key)?;
    if known.is_none() {
        let sql = "SELECT COUNT(*) FROM telemetry WHERE span_s = ?1 AND start_s = ?2";
        let rows = first(tx, sql, params![span.seconds(), start_s], |row| Ok(row.get::<i64>(0)?))?;
        if rows.unwrap_or(0) >= MAX_ROWS {
            OTHER_SITES.clone_into(&mut key.site);
            known = read(tx, span, start_s, &key)?;
        }
    }
    if let Some(known) = known {
        counts.merge(&known);
    }
    tx.execute(
        "INSERT INTO telemetry (span_s, start_s, model, version, class, site, counts)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (span_s, start_s, model, version, class, site)
         DO UPDATE SET counts = excluded.counts",
        params![
            span.seconds(),
            start_s,
            key.model,
            key.version,
            key.class,
            key.site,
            to_json(&counts)
        ],
    )?;
    Ok(())
}

fn read(tx: &Tx<'_>, span: Span, start_s: i64, key: &Key) -> Result<Option<Counts>, StoreError> {
    let sql = "SELECT counts FROM telemetry WHERE span_s = ?1 AND start_s = ?2
               AND model = ?3 AND version = ?4 AND class = ?5 AND site = ?6";
    let Key { model, version, class, site } = key;
    first(tx, sql, params![span.seconds(), start_s, model, version, class, site], |row| {
        counts_of(row, 0)
    })
}

fn counts_of(row: &Row<'_>, index: usize) -> Result<Counts, StoreError> {
    from_json("telemetry", &row.get::<String>(index)?)
}

/// Adds the hours of the first day that is older than they are kept up to days, and removes days that
/// are older than those are kept. Whether there is more of it to do; doing it again changes nothing.
pub(super) fn fold(tx: &Tx<'_>, now: Timestamp, keep: Keep) -> Result<bool, StoreError> {
    let (hour, day) = (Span::Hour.seconds(), Span::Day.seconds());
    let before = |kept_s: u64| now.as_second().saturating_sub_unsigned(kept_s);
    let sql = "DELETE FROM telemetry WHERE span_s = ?1 AND start_s < ?2";
    tx.execute(sql, params![day, before(keep.days_s)])?;
    // Whole days.
    let until = before(keep.hours_s).div_euclid(day) * day;
    let sql = "SELECT start_s FROM telemetry WHERE span_s = ?1 AND start_s < ?2
               ORDER BY start_s LIMIT 1";
    let Some(oldest) = first(tx, sql, params![hour, until], |row| Ok(row.get::<i64>(0)?))? else {
        return Ok(false);
    };
    let start_s = oldest.div_euclid(day) * day;
    let hours = collect(
        tx,
        "SELECT model, version, class, site, counts FROM telemetry
         WHERE span_s = ?1 AND start_s >= ?2 AND start_s < ?3",
        params![hour, start_s, start_s + day],
        |row| {
            let key = Key {
                model: row.get(0)?,
                version: row.get(1)?,
                class: row.get(2)?,
                site: row.get(3)?,
            };
            Ok((key, counts_of(row, 4)?))
        },
    )?;
    let mut days: BTreeMap<Key, Counts> = BTreeMap::new();
    for (key, counts) in hours {
        days.entry(key).or_default().merge(&counts);
    }
    // A day that is not kept any more either is not begun.
    if start_s >= before(keep.days_s) {
        for (key, counts) in days {
            put(tx, Span::Day, start_s, key, counts)?;
        }
    }
    let sql = "DELETE FROM telemetry WHERE span_s = ?1 AND start_s >= ?2 AND start_s < ?3";
    tx.execute(sql, params![hour, start_s, start_s + day])?;
    Ok(true)
}

/// What was counted since then, by release, the newest version of each model line first. Days that
/// are not complete, or whose hours are kept, are made of hours.
pub(super) fn series(
    tx: &Tx<'_>,
    query: &TelemetryQuery,
    since: Timestamp,
) -> Result<Vec<TelemetrySeries>, StoreError> {
    let span = query.span.unwrap_or(Span::Hour);
    let most_s = span.seconds();
    let or_empty = |text: Option<String>| text.unwrap_or_default();
    let wanted = [
        or_empty(query.model.as_ref().map(ToString::to_string)),
        or_empty(query.version.as_ref().map(ToString::to_string)),
        or_empty(query.class.as_ref().map(ToString::to_string)),
        or_empty(query.site.as_ref().map(ToString::to_string)),
    ];
    let mut found: BTreeMap<(String, String), BTreeMap<i64, Counts>> = BTreeMap::new();
    for span_s in [Span::Hour.seconds(), Span::Day.seconds()] {
        if span_s > most_s {
            break;
        }
        tx.each(
            "SELECT model, version, start_s, counts FROM telemetry
             WHERE span_s = ?1 AND start_s >= ?2 AND (?3 = '' OR model = ?3)
             AND (?4 = '' OR version = ?4) AND (?5 = '' OR class = ?5) AND (?6 = '' OR site = ?6)",
            params![span_s, start_s(since, span), wanted[0], wanted[1], wanted[2], wanted[3]],
            |row| {
                let points = found.entry((row.get(0)?, row.get(1)?)).or_default();
                let start_s = row.get::<i64>(2)?.div_euclid(most_s) * most_s;
                points.entry(start_s).or_default().merge(&counts_of(row, 3)?);
                Ok::<_, StoreError>(true)
            },
        )?;
    }
    let mut all = Vec::with_capacity(found.len());
    for ((model, version), points) in found {
        let shown = |(start_s, counts): (i64, Counts)| {
            let start = Timestamp::from_second(start_s).unwrap_or(Timestamp::UNIX_EPOCH);
            counts.shown(start)
        };
        all.push(TelemetrySeries {
            model: column("telemetry", &model)?,
            version: column("telemetry", &version)?,
            points: points.into_iter().map(shown).collect(),
        });
    }
    all.sort_by(|a, b| a.model.cmp(&b.model).then_with(|| b.version.cmp(&a.version)));
    Ok(all)
}
