//! What goes over a stream's connection: ttrpc's frames, and in them the messages of containerd's
//! streaming service (`containerd.services.streaming.v1`) and of its byte streams
//! (`containerd.types.transfer`). Pure; what comes in is bounded and checked.

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, CodedOutputStream, Message as _, rt::WireType};
use ttrpc::proto::{
    FLAG_NO_DATA, FLAG_REMOTE_CLOSED, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA,
    MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
};
use ttrpc::{Code, Request, Response};

/// The service that containerd calls, and its one method.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
/// Its method.
pub const METHOD: &str = "Stream";

/// A frame's longest payload, in bytes: containerd sends 32 KiB of data at most.
pub const MAX_PAYLOAD: usize = 128 << 10;
/// The longest request that can open a stream, in bytes: two names and a deadline.
const MAX_OPENING: usize = 4096;

const STREAM_INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
const EMPTY: &str = "google.protobuf.Empty";

/// The other side does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a frame of containerd's streaming protocol")]
pub struct Malformed;

/// What a connection begins with.
#[derive(Debug, PartialEq)]
pub enum Opening {
    /// More bytes are needed to tell.
    Unclear,
    /// A call of the streaming service: the number of its stream, how many bytes the request has, and its
    /// payload, which is the first message where a client sends it along.
    Stream(u32, usize, Vec<u8>),
    /// Anything else.
    Other,
}

/// Tells what a connection begins with.
#[must_use]
pub fn opening(bytes: &[u8]) -> Opening {
    let Some(header) = bytes.first_chunk::<MESSAGE_HEADER_LENGTH>() else {
        return Opening::Unclear;
    };
    let header = MessageHeader::from(header);
    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
    if header.type_ != MESSAGE_TYPE_REQUEST || length > MAX_OPENING {
        return Opening::Other;
    }
    let Some(payload) = bytes.get(MESSAGE_HEADER_LENGTH..MESSAGE_HEADER_LENGTH + length) else {
        return Opening::Unclear;
    };
    match Request::parse_from_bytes(payload) {
        Ok(request) if request.service == SERVICE && request.method == METHOD => Opening::Stream(
            header.stream_id,
            MESSAGE_HEADER_LENGTH + length,
            request.payload,
        ),
        _ => Opening::Other,
    }
}

/// One frame from the client.
#[derive(Debug, PartialEq)]
pub struct Frame {
    /// Its payload; empty without one.
    pub payload: Vec<u8>,
    /// The client sends nothing after it.
    pub last: bool,
}

/// Takes the first frame of this stream off the buffer; `None` when it is not complete yet.
///
/// # Errors
/// For a frame that is too long, of another stream or of no kind that belongs here.
pub fn take_frame(buffer: &mut Vec<u8>, stream: u32) -> Result<Option<Frame>, Malformed> {
    let Some(header) = buffer.first_chunk::<MESSAGE_HEADER_LENGTH>() else {
        return Ok(None);
    };
    let header = MessageHeader::from(header);
    let length = usize::try_from(header.length).map_err(|_| Malformed)?;
    if header.type_ != MESSAGE_TYPE_DATA || header.stream_id != stream || length > MAX_PAYLOAD {
        return Err(Malformed);
    }
    let end = MESSAGE_HEADER_LENGTH + length;
    if buffer.len() < end {
        return Ok(None);
    }
    let payload = buffer
        .get(MESSAGE_HEADER_LENGTH..end)
        .unwrap_or_default()
        .to_vec();
    buffer.drain(..end);
    Ok(Some(Frame {
        payload,
        last: header.flags & FLAG_REMOTE_CLOSED != 0,
    }))
}

/// A message from the client.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// The first: which stream this is.
    Init(String),
    /// Bytes of standard input.
    Data(Vec<u8>),
    /// So many more bytes of output may be sent.
    WindowUpdate(u32),
}

/// Reads a frame's payload.
///
/// # Errors
/// For anything but the three messages.
pub fn decode(payload: &[u8]) -> Result<Message, Malformed> {
    let any = Any::parse_from_bytes(payload).map_err(|_| Malformed)?;
    // With or without a host in front of the name.
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        STREAM_INIT => {
            let id = String::from_utf8(first_bytes(&any.value)?).map_err(|_| Malformed)?;
            Ok(Message::Init(id))
        }
        DATA => Ok(Message::Data(first_bytes(&any.value)?)),
        WINDOW_UPDATE => {
            let update = first_varint(&any.value)?;
            // An int32; containerd never takes window back.
            u32::try_from(update)
                .map(Message::WindowUpdate)
                .map_err(|_| Malformed)
        }
        _ => Err(Malformed),
    }
}

/// Each of the messages has one field, of number 1; others are skipped.
fn field_one<T>(
    bytes: &[u8],
    kind: WireType,
    read: impl Fn(&mut CodedInputStream<'_>) -> protobuf::Result<T>,
) -> Result<Option<T>, Malformed> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(|_| Malformed)? {
        let (number, wire) = (tag >> 3, tag & 7);
        let wire = WireType::new(wire).ok_or(Malformed)?;
        if number == 1 && wire == kind {
            found = Some(read(&mut input).map_err(|_| Malformed)?);
        } else {
            input.skip_field(wire).map_err(|_| Malformed)?;
        }
    }
    Ok(found)
}

fn first_bytes(bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
    let field = field_one(bytes, WireType::LengthDelimited, |input| input.read_bytes())?;
    Ok(field.unwrap_or_default())
}

fn first_varint(bytes: &[u8]) -> Result<i32, Malformed> {
    let field = field_one(bytes, WireType::Varint, |input| input.read_int32())?;
    Ok(field.unwrap_or_default())
}

fn data_frame(stream: u32, flags: u8, name: &str, value: Vec<u8>) -> Vec<u8> {
    let any = Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    };
    frame(
        stream,
        MESSAGE_TYPE_DATA,
        flags,
        &any.write_to_bytes().unwrap_or_default(),
    )
}

fn frame(stream_id: u32, type_: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        stream_id,
        type_,
        flags,
    };
    let mut bytes = Vec::from(header);
    bytes.extend_from_slice(payload);
    bytes
}

fn message(write: impl FnOnce(&mut CodedOutputStream<'_>) -> protobuf::Result<()>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut output = CodedOutputStream::vec(&mut bytes);
    // Writing to memory does not fail.
    let _ = write(&mut output).and_then(|()| output.flush());
    drop(output);
    bytes
}

/// The answer to the first message.
#[must_use]
pub fn acknowledgement(stream: u32) -> Vec<u8> {
    data_frame(stream, 0, EMPTY, Vec::new())
}

/// Bytes of output.
#[must_use]
pub fn data(stream: u32, bytes: &[u8]) -> Vec<u8> {
    data_frame(
        stream,
        0,
        DATA,
        message(|output| output.write_bytes(1, bytes)),
    )
}

/// Leave to send so many more bytes of input.
#[must_use]
pub fn window_update(stream: u32, bytes: u32) -> Vec<u8> {
    let update = i32::try_from(bytes).unwrap_or(i32::MAX);
    data_frame(
        stream,
        0,
        WINDOW_UPDATE,
        message(|output| output.write_int32(1, update)),
    )
}

/// A client's message that came with its request, as if it had come in a frame.
#[must_use]
pub fn message_frame(stream: u32, payload: &[u8]) -> Vec<u8> {
    frame(stream, MESSAGE_TYPE_DATA, 0, payload)
}

/// Nothing comes any more.
#[must_use]
pub fn end(stream: u32) -> Vec<u8> {
    frame(
        stream,
        MESSAGE_TYPE_DATA,
        FLAG_REMOTE_CLOSED | FLAG_NO_DATA,
        &[],
    )
}

/// The stream is refused.
#[must_use]
pub fn refusal(stream: u32, code: Code, sentence: &str) -> Vec<u8> {
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(code, sentence));
    let payload = response.write_to_bytes().unwrap_or_default();
    frame(stream, MESSAGE_TYPE_RESPONSE, 0, &payload)
}

/// The first message, as a client sends it; for tests.
#[cfg(test)]
pub fn init(stream: u32, id: &str) -> Vec<u8> {
    data_frame(
        stream,
        0,
        STREAM_INIT,
        message(|output| output.write_string(1, id)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(service: &str) -> Vec<u8> {
        let request = Request {
            service: service.into(),
            method: METHOD.into(),
            timeout_nano: 5,
            ..Request::default()
        };
        frame(
            1,
            MESSAGE_TYPE_REQUEST,
            0,
            &request.write_to_bytes().unwrap(),
        )
    }

    #[test]
    fn a_stream_is_told_from_other_calls_by_its_first_frame() {
        let stream = request(SERVICE);
        for cut in 0..stream.len() {
            assert_eq!(opening(&stream[..cut]), Opening::Unclear, "{cut}");
        }
        let whole = Opening::Stream(1, stream.len(), Vec::new());
        assert_eq!(opening(&stream), whole);
        assert_eq!(opening(&request("containerd.task.v3.Task")), Opening::Other);
        let header = |length, type_| {
            Vec::from(MessageHeader {
                length,
                stream_id: 1,
                type_,
                flags: 0,
            })
        };
        // A long request is not waited for.
        assert_eq!(
            opening(&header(1 << 20, MESSAGE_TYPE_REQUEST)),
            Opening::Other
        );
        assert_eq!(opening(&header(4, MESSAGE_TYPE_DATA)), Opening::Other);
    }

    #[test]
    fn messages_come_back_as_they_were_sent() {
        let sent = [
            (init(3, "c-stdin"), Message::Init("c-stdin".into())),
            (data(3, b"abc"), Message::Data(b"abc".to_vec())),
            (window_update(3, 65536), Message::WindowUpdate(65536)),
        ];
        let mut buffer: Vec<u8> = sent.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        buffer.extend(end(3));
        for (_, expected) in sent {
            let frame = take_frame(&mut buffer, 3).unwrap().unwrap();
            assert_eq!(decode(&frame.payload).unwrap(), expected);
            assert!(!frame.last);
        }
        let last = take_frame(&mut buffer, 3).unwrap().unwrap();
        assert!(last.last && last.payload.is_empty());
        assert_eq!(take_frame(&mut buffer, 3), Ok(None));
    }

    #[test]
    fn what_does_not_belong_here_is_refused() {
        assert_eq!(take_frame(&mut data(5, b"x"), 3), Err(Malformed));
        assert_eq!(take_frame(&mut request(SERVICE), 1), Err(Malformed));
        let long = MessageHeader {
            length: u32::try_from(MAX_PAYLOAD).unwrap() + 1,
            stream_id: 1,
            type_: MESSAGE_TYPE_DATA,
            flags: 0,
        };
        assert_eq!(take_frame(&mut Vec::from(long), 1), Err(Malformed));
        let negative = data_frame(
            1,
            0,
            WINDOW_UPDATE,
            message(|output| output.write_int32(1, -1)),
        );
        assert_eq!(decode(&negative[MESSAGE_HEADER_LENGTH..]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = opening(&bytes);
            let _ = decode(&bytes);
            let mut buffer = bytes.clone();
            while let Ok(Some(_)) = take_frame(&mut buffer, 1) {}
        }

        #[test]
        fn data_of_any_bytes_comes_back(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut buffer = data(1, &bytes);
            let frame = take_frame(&mut buffer, 1).unwrap().unwrap();
            prop_assert_eq!(decode(&frame.payload).unwrap(), Message::Data(bytes));
        }
    }
}
