// Photos as visitors bring them: bounds and kinds are read from a file's first bytes, before anything is decoded.

const SIZE = 480; // of the middle square that is kept, in pixels
const HEAD = 1 << 20; // bytes that are read before decoding; a photo's size stands within them

/** What is wrong with a photo, in a sentence for its visitor. */
export class PhotoError extends Error {}

/**
 * A file as a photo: {name, square, note}, with its middle square as a canvas.
 * Throws PhotoError for a file that is no photo, is damaged, or is larger than the page's limits.
 */
export async function readPhoto(file, name, limits) {
  if (file.size > limits.megabytes * 1e6) {
    throw new PhotoError(`${name} has ${(file.size / 1e6).toFixed(1)} MB, more than the ${limits.megabytes} MB of this page; make it smaller.`);
  }
  const found = readHead(new Uint8Array(await file.slice(0, HEAD).arrayBuffer()));
  if (!found) throw noPhoto(name);
  checkSize(name, found.width, found.height, limits);
  const bitmap = await createImageBitmap(file).catch(() => { throw noPhoto(name); });
  checkSize(name, bitmap.width, bitmap.height, limits); // a head may lie
  const note = found.animated ? `${name} is an animation; this is its first frame.` : "";
  return { name, square: middleSquare(bitmap), note };
}

function noPhoto(name) {
  return new PhotoError(`${name} is no image, or a damaged one; give a photo as JPEG, PNG, WebP or GIF.`);
}

function checkSize(name, width, height, { pixels, aspect }) {
  const size = `${width} x ${height} pixels`;
  if (width * height > pixels) {
    throw new PhotoError(`${name} has ${size}, more than the ${pixels / 1e6} million of this page; make it smaller.`);
  }
  if (!width || !height || Math.max(width, height) > aspect * Math.min(width, height)) {
    throw new PhotoError(`${name} is a strip of ${size}; crop it so that the long side is at most ${aspect} times the short one.`);
  }
}

function middleSquare(bitmap) {
  const short = Math.min(bitmap.width, bitmap.height);
  const square = new OffscreenCanvas(SIZE, SIZE);
  const context = square.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, SIZE, SIZE);
  context.drawImage(bitmap, (bitmap.width - short) / 2, (bitmap.height - short) / 2, short, short, 0, 0, SIZE, SIZE);
  bitmap.close();
  return square;
}

/** {width, height, animated} by the head of a file; null where it is none of the four kinds. */
function readHead(bytes) {
  const view = new DataView(bytes.buffer);
  const text = (start, end) => String.fromCharCode(...bytes.subarray(start, end));
  try {
    if (view.getUint32(0) === 0x89504e47) return readPng(view, bytes);
    if (text(0, 4) === "GIF8") return { width: view.getUint16(6, true), height: view.getUint16(8, true), animated: countFrames(bytes) > 1 };
    if (text(0, 4) === "RIFF" && text(8, 12) === "WEBP") return readWebp(view, text(12, 16));
    if (view.getUint16(0) === 0xffd8) return readJpeg(view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a file that ends too early
  }
  return null;
}

function readPng(view, bytes) {
  let animated = false;
  for (let at = 8; at + 8 <= bytes.length; at += 12 + view.getUint32(at)) {
    const kind = view.getUint32(at + 4);
    if (kind === 0x6163544c) animated = true; // acTL
    if (kind === 0x49444154) break; // IDAT
  }
  return { width: view.getUint32(16), height: view.getUint32(20), animated };
}

function readWebp(view, kind) {
  if (kind === "VP8X") {
    const side = (at) => 1 + view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
    return { width: side(24), height: side(27), animated: (view.getUint8(20) & 2) !== 0 };
  }
  if (kind === "VP8L") {
    const sizes = view.getUint32(21, true);
    return { width: 1 + (sizes & 0x3fff), height: 1 + ((sizes >> 14) & 0x3fff), animated: false };
  }
  return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff, animated: false };
}

function readJpeg(view) {
  for (let at = 2; ; at += 2 + view.getUint16(at + 2)) {
    const marker = view.getUint16(at);
    if (marker < 0xff00) return null;
    const startsFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (startsFrame) return { width: view.getUint16(at + 7), height: view.getUint16(at + 5), animated: false };
  }
}

/** Frames of a GIF, two at most: blocks are skipped by their lengths. */
function countFrames(bytes) {
  const tableSize = (flags) => (flags & 0x80 ? 3 << ((flags & 7) + 1) : 0);
  let at = 13 + tableSize(bytes[10]);
  let frames = 0;
  while (at < bytes.length && frames < 2) {
    if (bytes[at] === 0x2c) {
      frames += 1;
      at += 11 + tableSize(bytes[at + 9]);
    } else if (bytes[at] === 0x21) {
      at += 2;
    } else {
      break;
    }
    while (at < bytes.length && bytes[at]) at += bytes[at] + 1;
    at += 1;
  }
  return frames;
}
