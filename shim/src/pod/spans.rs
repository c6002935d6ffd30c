//! The start of a pod as OpenTelemetry spans: one of the whole, and below it one for each step of the timeline, as part
//! of the trace that containerd has of the same request. Names of steps may be a guest's; JSON escapes them.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::asked::pod_name::PodName;
use crate::pod::timeline::Timeline;

/// Where a request belongs in a trace (W3C Trace Context 1, `traceparent`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceParent {
    trace: String,
    span: String,
    sampled: bool,
}

impl TraceParent {
    /// That of a request, from the metadata that came with it; only a containerd that traces sends it.
    #[must_use]
    pub fn of(metadata: &HashMap<String, Vec<String>>) -> Option<Self> {
        Self::read(metadata.get("traceparent")?.first()?)
    }

    /// Reads `00-TRACE-SPAN-FLAGS`; of later versions what this one knows.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let mut fields = text.trim().split('-');
        let mut field = |length: usize| {
            let field = fields.next()?;
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            (field.len() == length && field.bytes().all(is_hex)).then_some(field)
        };
        let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        let zero = |field: &str| field.bytes().all(|byte| byte == b'0');
        if version == "ff"
            || zero(trace)
            || zero(span)
            || (version == "00" && fields.next().is_some())
        {
            return None;
        }
        Some(Self {
            trace: trace.to_owned(),
            span: span.to_owned(),
            sampled: u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1),
        })
    }
}

/// A pod as its spans name it.
#[derive(Debug)]
pub struct Named<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The sandbox's id.
    pub id: &'a str,
    /// Its name in Kubernetes.
    pub pod: Option<&'a PodName>,
}

/// The spans of a start as an OTLP document; nothing for a request of which containerd's trace is not kept.
/// `random` gives bytes that nobody else has.
#[must_use]
pub fn of_start(
    timeline: &Timeline,
    parent: Option<&TraceParent>,
    named: &Named<'_>,
    mut random: impl FnMut() -> u64,
) -> Option<Value> {
    if parent.is_some_and(|parent| !parent.sampled) {
        return None;
    }
    let trace = match parent {
        Some(parent) => parent.trace.clone(),
        None => format!("{:016x}{:016x}", random().max(1), random()),
    };
    // Zero is no id.
    let mut id = || format!("{:016x}", random().max(1));
    let mut marks: Vec<_> = timeline.marks.iter().collect();
    marks.sort_by_key(|mark| mark.micros);
    let at = |micros: u64| {
        let since = timeline
            .zero_unix_ns
            .saturating_add(micros.saturating_mul(1000));
        // A number of 64 bits is a string in OTLP's JSON.
        since.to_string()
    };
    let whole = id();
    let span = |id: String, parent: Option<&str>, name: &str, from: u64, to: u64| {
        // SPAN_KIND_INTERNAL.
        let mut span = json!({
            "traceId": trace, "spanId": id, "name": name, "kind": 1,
            "startTimeUnixNano": at(from), "endTimeUnixNano": at(to),
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = json!(parent);
        }
        span
    };
    let end = marks.last().map_or(0, |mark| mark.micros);
    let above = parent.map(|parent| parent.span.as_str());
    let mut spans = vec![span(whole.clone(), above, "brig.pod.start", 0, end)];
    let mut before = 0;
    for mark in marks {
        spans.push(span(id(), Some(&whole), &mark.name, before, mark.micros));
        before = mark.micros;
    }
    let attribute =
        |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
    let mut attributes = vec![
        attribute("service.name", "containerd-shim-brig"),
        attribute("service.version", env!("CARGO_PKG_VERSION")),
        attribute("containerd.namespace", named.namespace),
        attribute("containerd.sandbox.id", named.id),
    ];
    if let Some(pod) = named.pod {
        attributes.extend([
            attribute("k8s.namespace.name", &pod.namespace),
            attribute("k8s.pod.name", &pod.name),
            attribute("k8s.pod.uid", &pod.uid),
        ]);
    }
    Some(json!({ "resourceSpans": [{
        "resource": { "attributes": attributes },
        "scopeSpans": [{ "scope": { "name": "brig" }, "spans": spans }],
    }] }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, SystemTime};

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn timeline(marks: &[(&str, u64)]) -> Timeline {
        let zero = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut timeline = Timeline::new(zero);
        for (name, millis) in marks {
            timeline.mark(name, zero + Duration::from_millis(*millis));
        }
        timeline
    }

    fn spans(timeline: &Timeline, parent: Option<&str>) -> Option<Vec<Value>> {
        let parent = parent.map(|parent| TraceParent::read(parent).unwrap());
        let pod = PodName::of_metadata("shop", "web-0", "u-1");
        let named = Named {
            namespace: "k8s.io",
            id: "abc",
            pod: pod.as_ref(),
        };
        let mut next = 0;
        let document = of_start(timeline, parent.as_ref(), &named, || {
            next += 1;
            next
        })?;
        let attributes = document["resourceSpans"][0]["resource"]["attributes"].to_string();
        for known in [
            "web-0",
            "shop",
            "u-1",
            "abc",
            "k8s.io",
            "containerd-shim-brig",
        ] {
            assert!(attributes.contains(known), "{attributes}");
        }
        let spans = &document["resourceSpans"][0]["scopeSpans"][0]["spans"];
        Some(spans.as_array().unwrap().clone())
    }

    #[test]
    fn a_start_is_a_span_of_containerds_trace_with_one_below_for_each_step() {
        let timeline = timeline(&[("create", 5), ("later", 30), ("early", 2)]);
        let spans = spans(&timeline, Some(PARENT)).unwrap();
        let field = |at: usize, name: &str| spans[at][name].as_str().unwrap().to_owned();
        let names: Vec<String> = (0..4).map(|at| field(at, "name")).collect();
        assert_eq!(names, ["brig.pod.start", "early", "create", "later"]);
        assert!((0..4).all(|at| field(at, "traceId") == "4bf92f3577b34da6a3ce929d0e0e4736"));
        assert_eq!(field(0, "parentSpanId"), "00f067aa0ba902b7");
        assert!((1..4).all(|at| field(at, "parentSpanId") == field(0, "spanId")));
        for (at, from, to) in [(0, 0, 30), (1, 0, 2), (2, 2, 5), (3, 5, 30)] {
            let nanos = |millis: u64| (1_000_000_000_000 + millis * 1_000_000).to_string();
            assert_eq!(field(at, "startTimeUnixNano"), nanos(from));
            assert_eq!(field(at, "endTimeUnixNano"), nanos(to));
        }
        let ids: std::collections::BTreeSet<String> =
            (0..4).map(|at| field(at, "spanId")).collect();
        assert_eq!(ids.len(), 4);
    }

    #[test]
    fn without_containerds_trace_it_is_one_of_its_own_and_with_one_that_is_not_kept_nothing() {
        let timeline = timeline(&[("create", 5)]);
        let own = spans(&timeline, None).unwrap();
        assert!(own[0].get("parentSpanId").is_none());
        assert_eq!(own[0]["traceId"].as_str().unwrap().len(), 32);
        let dropped = PARENT.replace("-01", "-00");
        assert!(spans(&timeline, Some(&dropped)).is_none());
    }

    #[test]
    fn only_what_the_recommendation_allows_is_a_parent() {
        assert!(TraceParent::read(PARENT).is_some());
        assert!(TraceParent::read(&format!("{}-more", PARENT.replace("00-4", "01-4"))).is_some());
        let zeros = "0".repeat(32);
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            &PARENT.to_uppercase(),
            &format!("{PARENT}-more"),
            &PARENT.replace("00-4", "ff-4"),
            &PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &zeros),
            &PARENT.replace("00f067aa0ba902b7", "0000000000000000"),
        ] {
            assert_eq!(TraceParent::read(wrong), None, "{wrong}");
        }
        let metadata = HashMap::from([("traceparent".to_owned(), vec![PARENT.to_owned()])]);
        assert!(TraceParent::of(&metadata).is_some());
        assert!(TraceParent::of(&HashMap::new()).is_none());
    }

    proptest! {
        #[test]
        fn whatever_a_step_is_called_the_document_is_whole(name in any::<String>(), parent in any::<String>()) {
            let _ = TraceParent::read(&parent);
            let spans = spans(&timeline(&[(&name, 7)]), None).unwrap();
            prop_assert_eq!(spans[1]["name"].as_str(), Some(name.as_str()));
        }
    }
}
