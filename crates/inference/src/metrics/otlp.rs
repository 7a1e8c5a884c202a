//! Families as a message of the OpenTelemetry protocol. Everything in it is cumulative: whoever misses one
//! message has all of it in the next.

use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum,
};
use opentelemetry_proto::tonic::resource::v1::Resource;

use super::family::{Attributes, Family, Kind, Point, Reading};

/// Who writes the metrics, as OpenTelemetry names libraries.
const SCOPE: &str = "slmops";

/// The message that says all of `families` of what `resource` describes.
pub(crate) fn message(
    families: Vec<Family>,
    resource: &[(String, String)],
) -> ExportMetricsServiceRequest {
    let now = SystemTime::now();
    let resource = resource.iter().map(|(name, value)| text(name, value.clone())).collect();
    let scope = InstrumentationScope {
        name: SCOPE.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let said = families.into_iter().filter(|family| !family.points.is_empty());
    let metrics = said.map(|family| metric(family, now)).collect();
    let scope_metrics =
        vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }];
    let resource = Resource { attributes: resource, ..Resource::default() };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource),
            scope_metrics,
            ..ResourceMetrics::default()
        }],
    }
}

fn metric(family: Family, now: SystemTime) -> Metric {
    let Family { name, help, unit, kind, points } = family;
    let aggregation_temporality = AggregationTemporality::Cumulative as i32;
    let data = match kind {
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: points.into_iter().filter_map(|point| histogram(point, now)).collect(),
            aggregation_temporality,
        }),
        Kind::Counter => Data::Sum(Sum {
            data_points: points.into_iter().filter_map(|point| number(point, now)).collect(),
            aggregation_temporality,
            is_monotonic: true,
        }),
        Kind::Gauge => Data::Gauge(Gauge {
            data_points: points.into_iter().filter_map(|point| number(point, now)).collect(),
        }),
    };
    Metric {
        name: name.to_owned(),
        description: help.to_owned(),
        unit: unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn number(point: Point, now: SystemTime) -> Option<NumberDataPoint> {
    let Reading::Number(value) = point.value else { return None };
    // What is counted is whole, and is said as such.
    let value = match value.fract() == 0.0 && value.abs() < 9e15 {
        true => Number::AsInt(value as i64),
        false => Number::AsDouble(value),
    };
    Some(NumberDataPoint {
        attributes: attributes(point.attributes),
        start_time_unix_nano: nanoseconds(point.since),
        time_unix_nano: nanoseconds(now),
        value: Some(value),
        ..NumberDataPoint::default()
    })
}

fn histogram(point: Point, now: SystemTime) -> Option<HistogramDataPoint> {
    let Reading::Histogram(histogram) = point.value else { return None };
    Some(HistogramDataPoint {
        attributes: attributes(point.attributes),
        start_time_unix_nano: nanoseconds(point.since),
        time_unix_nano: nanoseconds(now),
        count: histogram.count(),
        sum: Some(histogram.sum),
        explicit_bounds: histogram.bounds.to_vec(),
        bucket_counts: histogram.counts,
        ..HistogramDataPoint::default()
    })
}

fn attributes(attributes: Attributes) -> Vec<KeyValue> {
    attributes.into_iter().map(|(name, value)| text(name, value)).collect()
}

fn text(name: &str, value: String) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::StringValue(value)) });
    KeyValue { key: name.to_owned(), value, ..KeyValue::default() }
}

fn nanoseconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|it| u64::try_from(it.as_nanos()).ok()).unwrap_or(0)
}
