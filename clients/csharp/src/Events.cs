using System;
using System.Xml.Linq;

namespace Safelight
{
    /// <summary>Something that happened to a generation: Accepted, Progress, Preview, Picture or Finished.</summary>
    public abstract class Event
    {
        internal Event() { }

        internal static Event Read(EventHandle happened, Generation generation)
        {
            switch (Native.safelight_event_get_kind(happened))
            {
                case EventKind.Accepted: return new Accepted(generation.Name, JsonOf(happened));
                case EventKind.Progress: return new Progress(happened);
                case EventKind.Preview: return new Preview(happened);
                case EventKind.Picture:
                    return happened.While(_ => new Picture(
                        Native.safelight_event_image(happened), Native.safelight_event_output_index(happened)));
                case EventKind.Finished: return new Finished(JsonOf(happened));
                default: return null;  // an event that a later minor version of the library has added
            }
        }

        private static string JsonOf(EventHandle happened) =>
            happened.While(_ => Native.Text(Native.safelight_event_json(happened)));
    }

    /// <summary>The server has admitted the generation.</summary>
    public sealed class Accepted : Event
    {
        internal Accepted(string generation, string json)
        {
            XElement spec = Safelight.Json.Parse(json).Element("spec") ?? new XElement("spec");
            Generation = generation;
            WidthPx = (int)Safelight.Json.Number(spec, "widthPx");
            HeightPx = (int)Safelight.Json.Number(spec, "heightPx");
            Json = json;
        }

        /// <summary>The generation's name, "generations/ID".</summary>
        public string Generation { get; }

        /// <summary>Width of the pictures in pixels.</summary>
        public int WidthPx { get; }

        public int HeightPx { get; }

        /// <summary>The whole Accepted message as JSON.</summary>
        public string Json { get; }
    }

    /// <summary>An output has made a step.</summary>
    public sealed class Progress : Event
    {
        internal Progress(EventHandle happened)
        {
            OutputIndex = Native.safelight_event_output_index(happened);
            Step = Native.safelight_event_step(happened);
            NumSteps = Native.safelight_event_num_steps(happened);
        }

        public int OutputIndex { get; }
        public int Step { get; }
        public int NumSteps { get; }
    }

    /// <summary>A preview or a picture.</summary>
    public abstract class Image : Event
    {
        internal Image(IntPtr image, int outputIndex)
        {
            OutputIndex = outputIndex;
            MediaType = Native.Text(Native.safelight_image_media_type(image));
            WidthPx = Native.safelight_image_width_px(image);
            HeightPx = Native.safelight_image_height_px(image);
            StrideBytes = Native.safelight_image_stride_bytes(image);
            BottomUp = Native.safelight_image_bottom_up(image) != 0;
            IntPtr data = Native.safelight_image_data(image, out UIntPtr numBytes);
            Data = Native.Bytes(data, checked((int)numBytes.ToUInt64()));
        }

        public int OutputIndex { get; }

        /// <summary>Encoding of the data, such as "image/png" or "application/x-raw-rgba8".</summary>
        public string MediaType { get; }

        public int WidthPx { get; }
        public int HeightPx { get; }

        /// <summary>Bytes from one row to the next for raw pixels, else 0.</summary>
        public int StrideBytes { get; }

        /// <summary>Whether the first of the raw rows is the lowest one.</summary>
        public bool BottomUp { get; }

        /// <summary>The encoded bytes.</summary>
        public byte[] Data { get; }
    }

    /// <summary>How an output looks after a step.</summary>
    public sealed class Preview : Image
    {
        internal Preview(EventHandle happened)
            : base(Native.safelight_event_image(happened), Native.safelight_event_output_index(happened))
        {
            Step = Native.safelight_event_step(happened);
            NumDropped = Native.safelight_event_num_dropped(happened);
        }

        public int Step { get; }

        /// <summary>Number of previews that were skipped since the previous one.</summary>
        public int NumDropped { get; }
    }

    /// <summary>A finished picture, whose SHA-256 has been checked.</summary>
    public sealed class Picture : Image
    {
        internal Picture(IntPtr image, int outputIndex) : base(image, outputIndex)
        {
            Seed = Native.safelight_image_seed(image);
        }

        public ulong Seed { get; }
    }

    /// <summary>The last event: all pictures have been received.</summary>
    public sealed class Finished : Event
    {
        internal Finished(string json)
        {
            XElement usage = Safelight.Json.Parse(json).Element("usage") ?? new XElement("usage");
            NumSteps = Safelight.Json.Number(usage, "numSteps");
            Json = json;
        }

        /// <summary>Denoising steps that were computed, over all outputs.</summary>
        public long NumSteps { get; }

        /// <summary>The whole Finished message as JSON.</summary>
        public string Json { get; }
    }
}
