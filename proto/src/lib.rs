//! The records and the two services, generated from the `.proto` files, and their JSON form.

pub mod batch;
#[cfg(test)]
mod evolution;

use std::sync::LazyLock;

use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions,
};

/// Package `palisade.v1`.
#[allow(
    unused_qualifications,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("palisade.v1");
}

/// Interfaces of container runtimes.
#[expect(clippy::all, reason = "generated")]
#[allow(
    unused_qualifications,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod runtime {
    pub mod nri {
        tonic::include_proto!("nri.pkg.api.v1alpha1");
    }
    pub mod ttrpc {
        tonic::include_proto!("ttrpc");
    }
    pub mod containers {
        tonic::include_proto!("containerd.services.containers.v1");
    }
    pub mod images {
        tonic::include_proto!("containerd.services.images.v1");
    }
    pub mod events {
        tonic::include_proto!("containerd.services.events.v1");
    }
    pub mod tasks {
        tonic::include_proto!("containerd.services.tasks.v1");
    }
    pub mod namespaces {
        tonic::include_proto!("containerd.services.namespaces.v1");
    }
}

/// What the `.proto` files say, compiled.
const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

static RECORD: LazyLock<Option<MessageDescriptor>> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).ok()?.get_message_by_name("palisade.v1.Record"));

/// A record as one JSON object: field names as in the `.proto` file, numbers as numbers, and every field present,
/// so that a reader need not know the defaults.
///
/// # Errors
///
/// When the bytes are not a record.
pub fn record_to_json(bytes: &[u8]) -> Result<serde_json::Value, prost::DecodeError> {
    let Some(descriptor) = RECORD.clone() else { return Ok(serde_json::Value::Null) };
    let message = DynamicMessage::decode(descriptor, bytes)?;
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .skip_default_fields(false);
    Ok(message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .unwrap_or(serde_json::Value::Null))
}

/// Reads what [`record_to_json`] has made. What is left out has its default; what this build does not know is
/// passed over.
///
/// # Errors
///
/// When the text is not JSON, or a field in it has a value of another type than that of a record.
pub fn record_from_json(text: &str) -> Result<v1::Record, serde_json::Error> {
    let Some(descriptor) = RECORD.clone() else { return Ok(v1::Record::default()) };
    let mut text = serde_json::Deserializer::from_str(text);
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(descriptor, &mut text, &options)?;
    text.end()?;
    message.transcode_to().map_err(|error| serde_json::Error::io(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn json_has_the_names_of_the_proto_file_and_plain_numbers() {
        let record = v1::Record {
            node: "n1".to_owned(),
            time: 1_700_000_000_000_000_001,
            decision: Some(v1::Decision { verdict: "denied".to_owned(), ..Default::default() }),
            event: Some(v1::record::Event::Exec(v1::ProcessExec { argument_count: 2, ..Default::default() })),
            ..Default::default()
        };
        let json = record_to_json(&record.encode_to_vec()).unwrap();
        assert_eq!(json["time"], 1_700_000_000_000_000_001_u64);
        assert_eq!(json["exec"]["argument_count"], 2);
        assert_eq!(json["decision"]["verdict"], "denied");
        assert_eq!(json["exec"]["arguments_truncated"], false);
        assert_eq!(record_from_json(&json.to_string()).unwrap(), record);
    }

    #[test]
    fn json_of_another_build_is_read_as_far_as_it_is_known() {
        let text = r#"{"time": 7, "later": {"a": 1}, "container": null, "exec": {"executable": "/a\u001b", "later": [1]}}"#;
        let exec = v1::ProcessExec { executable: "/a\u{1b}".to_owned(), ..Default::default() };
        let event = Some(v1::record::Event::Exec(exec));
        assert_eq!(record_from_json(text).unwrap(), v1::Record { time: 7, event, ..Default::default() });
        for wrong in ["", "5", "[]", r#"{"time": "soon"}"#, r#"{"exec": 5}"#, "{} {}"] {
            assert!(record_from_json(wrong).is_err(), "{wrong}");
        }
    }
}
